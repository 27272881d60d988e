#!/usr/bin/env bash
# Builds the CUDA kernels and their tests on a machine with a GPU, runs `ctest -L gpu`, compute-sanitizer on the short
# cases, then the kernel benchmark (arguments go to it).
set -euo pipefail
cd "$(dirname "$0")/../.."
cmake -S . -B build-gpu -G Ninja -DHYBRID_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="${ARCH:-90a}"
time cmake --build build-gpu -j"$(nproc)" --target gpu_elementwise gpu_linear gpu_attention gpu_sample bench_cuda_kernels
failed=0
time ctest --test-dir build-gpu -L gpu --output-on-failure --timeout 240 || failed=1
if [ "${SANITIZE:-1}" = 1 ]; then
  for test in gpu_linear:'*/1.equals*' gpu_attention:'GpuAttention/1.*ragged*:GpuAttentionBits/0.*cut*' gpu_sample:'*log_prob*:*penalties*'; do
    for tool in memcheck racecheck; do
      timeout 120 compute-sanitizer --tool $tool --error-exitcode 1 build-gpu/tests/cuda/"${test%%:*}" \
        --gtest_filter="${test#*:}" --gtest_brief=1 || { echo "FAILED (or out of time): $tool of $test"; failed=1; }
    done
  done
fi
build-gpu/benchmarks/bench_cuda_kernels "$@"
exit $failed
