"""The cubins in the package: of these sources, of the pinned compiler, the same bytes again."""

from __future__ import annotations

import tomllib
import zipfile
from pathlib import Path

import pytest

from qgraph.backends.cuda import images, make_cubins, nvrtc
from qgraph.backends.cuda.choice import PRODUCTS, SMALL, TILES_64, TILES_128, choose
from qgraph.backends.cuda.variants import KERNELS, KINDS, digest, source
from qgraph.errors import QGraphError

ROOT = Path(__file__).parent.parent.parent


def test_the_cubins_are_of_these_sources() -> None:
    made_of = images.manifest()
    assert made_of == {
        "nvrtc": "12.9",
        "options": list(nvrtc.OPTIONS),
        "sources": {kernel: digest(kernel) for kernel in KERNELS},
    }, "if sources were changed: python -m qgraph.backends.cuda.make_cubins"
    for arch in images.ARCHITECTURES:
        with zipfile.ZipFile(images.archive(arch)) as archive:
            assert archive.namelist() == [f"{kernel}.cubin" for kernel in KERNELS]


@pytest.mark.parametrize(("kernel", "arch"), [("epilogue_f32", 80), ("quantize_f16", 120)])
def test_the_same_source_gives_the_same_bytes(kernel: str, arch: int) -> None:
    assert make_cubins.pinned().compile(source(kernel), f"sm_{arch}") == images.image(kernel, arch)


@pytest.mark.slow
def test_all_cubins_made_again_are_the_same_files(tmp_path: Path) -> None:
    make_cubins.make(tmp_path)
    names = {path.name for path in images.FOLDER.iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()}
    for name in names:
        assert (tmp_path / name).read_bytes() == (images.FOLDER / name).read_bytes(), name


def test_cubins_are_small() -> None:
    assert sum(path.stat().st_size for path in images.FOLDER.iterdir()) < 3 * 2**20


@pytest.mark.parametrize(
    ("device", "cubins"),
    [
        (80, 80),
        (86, 86),
        (87, 86),
        (88, 86),
        (89, 89),
        (90, 90),
        (100, 100),
        (103, 100),
        (121, 120),
    ],
)
def test_a_device_takes_the_highest_cubin_of_its_major_version(device: int, cubins: int) -> None:
    assert images.fitting(device) == cubins


def test_a_newer_device_is_compiled_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QGRAPH_CACHE", str(tmp_path))
    monkeypatch.setattr(images, "ARCHITECTURES", (80,))
    assert images.fitting(90) is None
    first = images.image("epilogue_f16", 90)
    (cached,) = (tmp_path / "cuda").iterdir()
    assert cached.read_bytes() == first
    monkeypatch.setattr(nvrtc.Compiler, "compile", None)
    assert images.image("epilogue_f16", 90) == first


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cuda").write_text("in the way")
    monkeypatch.setenv("QGRAPH_CACHE", str(tmp_path))
    assert nvrtc.cubin(source("epilogue_f16"), 90)[:4] == b"\x7fELF"


def test_without_a_compiler_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "installed", list)
    nvrtc.newest.cache_clear()
    with pytest.raises(QGraphError, match=r"pip install nvidia-cuda-nvrtc$"):
        nvrtc.newest()
    with pytest.raises(QGraphError, match=r"nvidia-cuda-nvrtc-cu12==12\.9"):
        make_cubins.pinned()


def test_what_does_not_compile_is_said_in_one_line() -> None:
    with pytest.raises(QGraphError, match=r"^NVRTC 12\.9 .* sm_90: .*error.*$") as caught:
        make_cubins.pinned().compile("int main( {", "sm_90")
    assert "\n" not in str(caught.value)


def test_every_product_of_the_table_is_a_kernel() -> None:
    assert {product.kernel for product in PRODUCTS} <= set(KINDS)


def test_the_table_by_tokens() -> None:
    chosen = [choose(m, 4096, 4096, 80, 108) for m in (1, 8, 9, 16, 17, 32, 33, 2048)]
    small = [kernel for kernel in SMALL for _ in range(2)]
    assert chosen == [*small, TILES_64, TILES_128]
    assert choose(2048, 4096, 4096, 90, 132) is None
    assert choose(2048, 4096, 2048, 90, 132) == TILES_128
    assert choose(2048, 4100, 4096, 90, 132) == TILES_128  # the library wants multiples of 8
    assert choose(2048, 4096, 4096, 120, 132) == TILES_128
    assert TILES_128.grid(2048, 4100) == (33, 16)


def test_the_wheel_has_the_sources_and_the_cubins() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["qgraph.backends.cuda"]
    folder = images.FOLDER.parent
    packed = {path for pattern in patterns for path in folder.glob(pattern)}
    wanted = {path for name in ("kernels", "cubins") for path in (folder / name).iterdir()}
    assert packed == wanted
