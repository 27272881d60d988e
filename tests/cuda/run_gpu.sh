#!/usr/bin/env bash
# Builds the CUDA kernels and their tests on a machine with a GPU, runs `ctest -L gpu`, compute-sanitizer on short cases,
# then the kernel benchmark (arguments go to it). SANITIZE: memcheck (default), racecheck, or nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
cmake -S . -B build-gpu -G Ninja -DHYBRID_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="${ARCH:-90a}"
time cmake --build build-gpu -j"$(nproc)" --target gpu_elementwise gpu_rotate_and_store gpu_linear gpu_linear_tiles gpu_attention gpu_attention_bits gpu_attention_prefixes gpu_sample bench_cuda_kernels bench_cuda_step
# cuBLASLt, as torch's wheels bring it: `linear` finds it at run time, and without it its tests skip.
library=$(python3 -c 'import nvidia.cu13 as m; print(list(m.__path__)[0] + "/lib")' 2>/dev/null || true)
export LD_LIBRARY_PATH="$library:${LD_LIBRARY_PATH:-}"
failed=0
time ctest --test-dir build-gpu -L gpu --output-on-failure --timeout 180 || failed=1
tool=${SANITIZE-memcheck}
if [ -n "$tool" ]; then
  # Our kernels only: cuBLASLt's split-k kernels have hazards of their own.
  for test in gpu_linear:'GpuLinear/1.*both_apart*' gpu_linear_tiles:'*one_ragged*' gpu_sample:'*log_prob*:*penalties*' \
      gpu_attention_bits:'GpuAttentionBits/[02].*cut*:GpuAttentionBits/0.*replays*' \
      gpu_attention_prefixes:'GpuAttentionPrefixes/0.matter*'; do
    timeout "${SANITIZE_SECONDS:-180}" compute-sanitizer --tool "$tool" --kernel-name kns=hybrid --error-exitcode 1 \
      build-gpu/tests/cuda/"${test%%:*}" --gtest_filter="${test#*:}" --gtest_brief=1 ||
      { echo "FAILED (124: out of time) with $?: $tool of $test"; failed=1; }
  done
fi
build-gpu/benchmarks/bench_cuda_kernels "$@"
build-gpu/benchmarks/bench_cuda_step
exit $failed
