"""The command `qgraph`."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qgraph.cli import arguments as shell
from qgraph.cli import signals
from qgraph.cli import train as train_module
from qgraph.errors import QGraphError
from qgraph.io import files

if TYPE_CHECKING:
    import onnx_ir as ir

    from qgraph.pipeline.context import Context
    from qgraph.pipeline.pass_manager import Hook, Pass
    from qgraph.pipeline.remarks import Remarks


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A compiler for quantized neural networks.",
    epilog="Any command takes --traceback: show where an error came from.",
)

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="ONNX file, or folder of onnxruntime-genai.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to save; never the input.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration", "-c", metavar="DATA", help=".npz (axis 0: samples) or folder of .npz."
    ),
]
TargetName = Annotated[str, typer.Option("--target", "-t", help="See `qgraph targets`.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Use at most so many calibration feeds.")]
Seed = Annotated[int, typer.Option(min=0, help="For everything random.")]
Cache = Annotated[Path | None, typer.Option(help="Folder that keeps calibration statistics.")]
Verify = Annotated[bool, typer.Option("--verify", help="Check the model after every pass.")]


UNFORESEEN = 70
"""Status after an error that nobody has thought of, as in sysexits.h."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Errors that a user can act on are one line on stderr and status 2, unforeseen ones status 70;
    an interrupt is 130, SIGTERM 143. With `--traceback` among the arguments, where an error came
    from is shown before it.

    Args:
        arguments: instead of those of the process.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries, about themselves
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    given = sys.argv[1:] if arguments is None else arguments
    rest = [argument for argument in given if argument != "--traceback"]
    try:
        with signals.raised():
            status = int(app(rest, standalone_mode=False, prog_name="qgraph") or 0)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except signals.Terminated as end:
        return _complain("terminated", end.status)
    except Exception as error:
        if rest != given:
            traceback.print_exc()
        return _complain(*_explained(error))
    return _complain("interrupted", status) if status == 130 else status


def _explained(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit status."""
    if isinstance(error, QGraphError):
        return str(error), 2
    if isinstance(error, typer.TyperException):  # of the command line itself
        return error.format_message(), 2
    if isinstance(error, OSError):
        return f"{error.filename or 'input or output'}: {error.strerror or error}", 2
    if type(error).__module__.startswith("onnxruntime."):  # out of memory, in most cases
        return f"onnxruntime: {error}", 2
    if isinstance(error, MemoryError):
        return "out of memory: try --max-memory or a smaller model", 2
    kind = type(error).__name__
    return f"unforeseen {kind}, please report what --traceback shows: {error}", UNFORESEEN


def _complain(problem: str, status: int) -> int:
    print("qgraph:", " ".join(problem.split()), file=sys.stderr)
    return status


# ------------------------------------------------------------------------------ the commands


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """A compiler for quantized neural networks."""
    if version:
        from qgraph.report.page import versions

        print(" ".join(f"{name} {number}" for name, number in versions().items()))
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def compile(
    model: ModelArgument,
    output: Output,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="See `qgraph recipes`.")] = "static",
    calibration: Calibration = None,
    target: TargetName = "cpu",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Parameter of the recipe; repeatable."),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Gets the model, yields losses; see docs."),
    ] = None,
    samples: Samples = None,
    seed: Seed = 0,
    cache: Cache = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Hold at most so much at once: 2G, 500M.")
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all remarks.")] = None,
    decisions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measured figures to decide by; new ones are added."),
    ] = None,
    verify: Verify = False,
    custom_ops: Annotated[
        list[Path] | None,
        typer.Option(metavar="LIB.so", help="Library of the model's own operators; repeatable."),
    ] = None,
) -> None:
    """Quantize a model by a recipe and save it for a target."""
    import qgraph
    from qgraph.backends import get_target
    from qgraph.cli.progress import display
    from qgraph.io.models import check_output
    from qgraph.io.session import use_custom_ops
    from qgraph.recipes import get_recipe
    from qgraph.report.page import Compilation, human_size, to_html, to_json

    for library in custom_ops or []:
        use_custom_ops(library)
    settings = shell.settings(recipe, set_ or [])
    parameters = dict(settings)
    optimize_for = parameters.pop("optimize_for", "both")
    chosen = get_recipe(recipe, parameters)
    memory = None if max_memory is None else shell.parse_size(max_memory)
    source = qgraph.load(model)
    check_output(source, output)
    pages = [page for page in (report, json, decisions) if page is not None]
    given = [calibration, *settings.values(), train and f"{train.partition(':')[0]}.py"]
    shell.check_pages(pages, source, output, given)
    aim = get_target(target, optimize_for)
    if decisions is not None:
        aim = shell.deciding_by(decisions, aim)
    if train is None:
        compiled = qgraph.compile(
            source,
            chosen,
            calibration,
            aim,
            samples=samples,
            seed=seed,
            cache=cache,
            max_memory=memory,
            verify=verify,
            progress=display(),
        )
    else:
        compiled = train_module.train_and_compile(
            train, source, chosen, calibration, aim, samples, seed, verify
        )
    compiled.save(output)
    result = Compilation(
        model=str(model),
        output=str(output),
        recipe=recipe,
        target=target,
        bytes_before=shell.size_on_disk(source),
        bytes_after=shell.size_on_disk(qgraph.load(output)),
        remarks=compiled.remarks,
        parameters=settings,
    )
    if report is not None:
        files.write(report, to_html(result))
    if json is not None:
        files.write(json, to_json(result))
    print(compiled.remarks.summary())
    sizes = f"{human_size(result.bytes_before)} -> {human_size(result.bytes_after)}"
    print(f"{sizes}, saved as {output}")


@app.command()
def opt(
    model: ModelArgument,
    output: Output,
    passes: Annotated[
        str,
        typer.Option(
            "--passes", "-p", metavar="PIPELINE", help="first,second{key=value},module:Class"
        ),
    ],
    target: TargetName = "cpu",
    calibration: Calibration = None,
    samples: Samples = None,
    seed: Seed = 0,
    cache: Cache = None,
    print_after: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PASS", help="Print the model after this pass, or after `all`; repeatable."
        ),
    ] = None,
    verify: Verify = False,
) -> None:
    """Run a pipeline of passes on a model."""
    import qgraph
    from qgraph.backends import get_target
    from qgraph.cli.progress import display
    from qgraph.graph.annotation import Stage, copied, stages_of
    from qgraph.io.feeds import open_calibration
    from qgraph.io.models import check_output, save
    from qgraph.passes import all_passes
    from qgraph.pipeline.blame import blaming
    from qgraph.pipeline.context import Context
    from qgraph.pipeline.parse import parse
    from qgraph.pipeline.remarks import Remarks
    from qgraph.recipes.complete import complete

    written = parse(passes, all_passes())
    pipeline = complete(written, calibrated=calibration is not None)
    shown = set(print_after or [])
    if unknown := sorted(shown - {step.name for step in pipeline} - {"all"}):
        raise QGraphError(f"--print-after {unknown[0]}: the pipeline has no such pass")
    manager = qgraph.PassManager(pipeline, verify=verify, after=[_printer(shown)] if shown else [])
    aim, source = get_target(target), qgraph.load(model)
    check_output(source, output)
    feeds = None if calibration is None else open_calibration(calibration, source, samples=samples)
    context = Context(aim, feeds, seed=seed, cache=cache, progress=display())
    with blaming(copied(source), context):
        manager.run(source, context)
        save(source, output, open_session=aim.open_session)
    if pipeline != written:
        print(f"ran with what it needs: {manager}")
    for line in _effects(context.remarks):
        print(line)
    remarks = context.remarks
    if Stage.COMMITTED not in stages_of(source):  # verdicts that nothing has carried out
        remarks = Remarks(remarks.warnings())
    print(remarks.summary() or "no site was quantized")
    print(f"saved as {output}")


@app.command()
def inspect(model: ModelArgument) -> None:
    """Show what a model is made of and where it can be quantized."""
    import qgraph
    from qgraph.report.inspection import describe

    shell.show(describe(qgraph.load(model)))


@app.command()
def recipes() -> None:
    """List the recipes and their parameters."""
    from qgraph.recipes import RECIPES
    from qgraph.report.tables import row, table

    listing = table("recipe", "parameters", "")
    for name, recipe in RECIPES.items():
        shown = [f"{p.name}={p.default}" for p in shell.parameters(name).values()]
        row(listing, name, "\n".join(shown), shell.first_line(recipe))
    shell.show(listing)


@app.command()
def passes() -> None:
    """List the passes that a pipeline can be made of."""
    from qgraph.passes import all_passes
    from qgraph.report.tables import row, table

    listing = table("pass", "contract", "parameters", "")
    for name, step in sorted(all_passes().items()):
        row(
            listing,
            name,
            step.contract,
            "\n".join(shell.pass_parameters(step)),
            shell.first_line(step),
        )
    shell.show(listing)


@app.command()
def targets() -> None:
    """List the targets, and what has been measured on this machine."""
    from qgraph.backends import TARGETS, describe
    from qgraph.report.tables import row, table

    listing = table("target", "")
    for name, description in TARGETS:
        row(listing, name, description)
    shell.show(listing)
    print(describe())


@app.command()
def bench(
    models: Annotated[
        list[Path], typer.Argument(metavar="A B...", help="The first is the measure.")
    ],
    calibration: Calibration = None,
    target: TargetName = "cpu",
    samples: Samples = 8,
    rounds: Annotated[int, typer.Option(min=1, help="How often each model runs.")] = 15,
    seed: Seed = 0,
) -> None:
    """Compare the speed and the outputs of models with those of the first."""
    import qgraph
    from qgraph.backends import get_target
    from qgraph.cli.progress import display
    from qgraph.io.feeds import open_calibration
    from qgraph.io.random_feed import first_feed
    from qgraph.report.bench import benchmark
    from qgraph.report.tables import row, table

    loaded = [qgraph.load(model) for model in models]
    if calibration is None:
        feeds = [first_feed(loaded[0], None, seed)]
    else:
        feeds = [dict(f) for f in open_calibration(calibration, loaded[0], samples)]
    results = benchmark(models, feeds, rounds, display(), get_target(target).open_session)
    listing = table(
        "model", "speed", "quartiles", "SQNR", "ms here and now", right=("speed", "SQNR")
    )
    for result in results:
        spread = f"{result.low:.2f} to {result.high:.2f}"
        sqnr = f"{result.sqnr_db:.1f} dB"
        row(
            listing,
            result.name,
            f"{result.speedup:.2f}x",
            spread,
            sqnr,
            f"{result.milliseconds:.2f}",
        )
    shell.show(listing)
    if calibration is None:
        print("on random inputs: give -c DATA for typical ones")


def _effects(remarks: Remarks) -> Iterator[str]:
    """For each pass at how many sites it did something, and at how many it declined."""
    counts = Counter((r.pass_name, r.kind) for r in remarks if r.kind in ("applied", "declined"))
    for name in dict.fromkeys(name for name, _ in counts):
        effects = {kind: counts[name, kind] for kind in ("applied", "declined")}
        yield f"{name}: " + ", ".join(f"{kind} {n}" for kind, n in effects.items() if n)


def _printer(shown: set[str]) -> Hook:
    """A hook that prints the model after the passes called so."""

    def show(step: Pass, model: ir.Model, context: Context) -> None:
        from qgraph.graph.text.printer import to_text

        if shown & {step.name, "all"}:
            print(f"// after {step}\n{to_text(model)}")

    return show
