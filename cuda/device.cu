#include <map>
#include <mutex>

#include "device.cuh"
#include "launch.cuh"
#include "ops/ops.h"

namespace hybrid::cuda {

namespace {

// One growing allocation. Outgrown memory is never freed: it is at most as much as what is in use.
struct Region {
  void* data = nullptr;
  size_t bytes = 0;

  void grow(size_t needed, Stream stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
    invariant(status == cudaStreamCaptureStatusNone,
              "scratch cannot grow while a graph is captured: run the op once before");
    bytes = std::max({needed, 2 * bytes, size_t{1} << 20});
    check(cudaMalloc(&data, bytes));
    check(cudaMemset(data, 0, bytes));
    check(cudaDeviceSynchronize());
  }
};

struct DeviceState {
  int64_t multiprocessors = 0, shared_bytes = 0, capability = 0;
  Region scratch, counters;
};

std::mutex guard;

DeviceState& current() {
  static std::map<int, DeviceState> states;
  int index = 0;
  check(cudaGetDevice(&index));
  DeviceState& state = states[index];
  if (state.multiprocessors == 0) {
    int count = 0, bytes = 0, major = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index));
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index));
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    state.multiprocessors = count;
    state.capability = major;
    state.shared_bytes = bytes;
  }
  return state;
}

void* at_least(Region& region, size_t bytes, Stream stream) {
  if (bytes > region.bytes) region.grow(bytes, stream);
  return region.data;
}

}  // namespace

int64_t multiprocessors() {
  const std::lock_guard lock(guard);
  return current().multiprocessors;
}

int64_t shared_bytes_per_multiprocessor() {
  const std::lock_guard lock(guard);
  return current().shared_bytes;
}

bool is_built() { return true; }

bool can_overlap_launches() {
  const std::lock_guard lock(guard);
  return current().capability >= 9;
}

void* scratch(size_t bytes, Stream stream) {
  const std::lock_guard lock(guard);
  return at_least(current().scratch, bytes, stream);
}

int32_t* zeroed_counters(size_t count, Stream stream) {
  const std::lock_guard lock(guard);
  return static_cast<int32_t*>(at_least(current().counters, count * sizeof(int32_t), stream));
}

}  // namespace hybrid::cuda
