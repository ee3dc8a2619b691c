// stub_driver.cpp -- the functions of libcuda.so.1 that driver.py calls, launching on the emulator.
//
// It refuses what a driver would refuse: cubins of another architecture, kernels that a cubin has not, empty grids, too
// many threads, shared memory beyond 48 KiB, threads without a context, launches that fail.
//   QGRAPH_STUB_ARCH   of the device, such as 90      QGRAPH_STUB_CUDA   what the driver knows, such as 12090
//   QGRAPH_STUB_IDLE   launches do nothing            QGRAPH_STUB_DEVICES 0 for none
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
extern "C" int emu_launch(const char*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void**);
extern "C" int emu_has(const char*);
extern "C" const char* emu_error();

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201 };
enum { NO_BINARY_FOR_GPU = 209, NOT_FOUND = 500, LAUNCH_FAILED = 719 };
struct Module { const unsigned char* image; };
struct Function { std::string name; };
struct LaunchConfig {  // as cuda.h has it
  unsigned gx, gy, gz, bx, by, bz, shared;
  void *stream, *attributes;
  unsigned count;
};

static unsigned setting(const char* name, unsigned otherwise) {
  const char* value = getenv(name);
  return value ? atoi(value) : otherwise;
}
static unsigned device_arch() { return setting("QGRAPH_STUB_ARCH", 90); }
static bool initialized;
static char primary;
static thread_local void* context;
static void* last_stream;
static std::mutex emulator;  // it runs one launch at a time

template <class T>
static T at(const unsigned char* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}
// e_flags of a cubin: the architecture is in bits 8..15 since CUDA 13 (ABI version 8), before in bits 0..7
static unsigned image_arch(const unsigned char* elf) {
  const unsigned flags = at<uint32_t>(elf + 48);
  return elf[8] >= 8 ? flags >> 8 & 0xff : flags & 0xff;
}
static bool has_section(const unsigned char* elf, const std::string& name) {
  const unsigned char* sections = elf + at<uint64_t>(elf + 40);
  const unsigned size = at<uint16_t>(elf + 58), count = at<uint16_t>(elf + 60), names = at<uint16_t>(elf + 62);
  const char* text = reinterpret_cast<const char*>(elf + at<uint64_t>(sections + names * size + 24));
  for (unsigned i = 0; i < count; i++)
    if (name == text + at<uint32_t>(sections + i * size)) return true;
  return false;
}
extern "C" {
int cuDriverGetVersion(int* version) {
  *version = setting("QGRAPH_STUB_CUDA", 12090);
  return SUCCESS;
}
int cuInit(unsigned) {
  if (setting("QGRAPH_STUB_DEVICES", 1) == 0) return NO_DEVICE;
  initialized = true;
  return SUCCESS;
}
int cuDeviceGetName(char* name, int size, int device) {
  if (!initialized) return NOT_INITIALIZED;
  if (device != 0) return INVALID_DEVICE;
  snprintf(name, size, "Stub %u", device_arch());
  return SUCCESS;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? device_arch() / 10 : attribute == 76 ? device_arch() % 10 : attribute == 16 ? 3 : -1;
  return *value < 0 ? INVALID_VALUE : SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** retained, int) {
  *retained = &primary;
  return SUCCESS;
}
int cuCtxGetCurrent(void** current) {
  *current = context;
  return SUCCESS;
}
int cuCtxSetCurrent(void* wanted) {
  context = wanted;
  return wanted == &primary ? SUCCESS : INVALID_CONTEXT;
}
int cuModuleLoadData(Module** module, const void* image) {
  if (!context) return INVALID_CONTEXT;
  const unsigned char* elf = static_cast<const unsigned char*>(image);
  if (memcmp(elf, "\177ELF", 4) || elf[18] != 190) return INVALID_IMAGE;  // EM_CUDA
  const unsigned has = image_arch(elf), is = device_arch();
  if (has / 10 != is / 10 || has > is) return NO_BINARY_FOR_GPU;
  *module = new Module{elf};
  return SUCCESS;
}
int cuModuleGetFunction(Function** function, Module* module, const char* name) {
  if (!has_section(module->image, std::string(".text.") + name) || !emu_has(name)) return NOT_FOUND;
  *function = new Function{name};
  return SUCCESS;
}
int cuLaunchKernelEx(const LaunchConfig* config, Function* f, void** arguments, void**) {
  static const bool idle = setting("QGRAPH_STUB_IDLE", 0);
  const auto [gx, gy, gz, bx, by, bz, shared, stream, attributes, count] = *config;
  if (attributes || count) return INVALID_VALUE;
  if (!context) return INVALID_CONTEXT;
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || !bx || !by || !bz || bx * by * bz > 1024) return INVALID_VALUE;
  if (shared > 48 * 1024) return INVALID_VALUE;
  if (idle) return SUCCESS;
  std::lock_guard<std::mutex> one(emulator);
  last_stream = stream;
  return emu_launch(f->name.c_str(), gx, gy, gz, bx, by, bz, shared, arguments) ? LAUNCH_FAILED : SUCCESS;
}
int cuGetErrorString(int status, const char** text) {
  *text = status == LAUNCH_FAILED       ? emu_error()
          : status == NO_BINARY_FOR_GPU ? "no kernel image is available for execution on the device"
          : status == INVALID_IMAGE     ? "device kernel image is invalid"
          : status == INVALID_CONTEXT   ? "invalid device context"
          : status == INVALID_DEVICE    ? "invalid device ordinal"
          : status == NOT_INITIALIZED   ? "initialization error"
          : status == NO_DEVICE         ? "no CUDA-capable device is detected"
          : status == NOT_FOUND         ? "named symbol not found"
                                        : "invalid argument";
  return SUCCESS;
}
void* stub_last_stream() { return last_stream; }
}
