#include "ops/cpu/isa.h"

#include <cstdlib>
#include <string_view>

#include "common/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hybrid::cpu {

namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // all zero if the CPU lacks the leaf
  return r;
}

constexpr bool has(uint32_t word, int bit) { return (word >> bit) & 1u; }

// Register state that the operating system saves on a context switch; without it the instructions fault.
uint32_t saved_state() {
  if (!has(cpuid(1, 0).ecx, 27)) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Linux hands out the 8 KiB of tile registers on request only, once for all threads of the process.
bool request_tiles() {
  constexpr int arch_req_xcomp_perm = 0x1023, xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xtiledata) == 0;
}

std::vector<const Kernels*> find_supported() {
  std::vector<const Kernels*> found{&baseline_kernels};
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const uint32_t state = saved_state();
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;

  const bool avx2 = ymm && has(seven.ebx, 5) && has(one.ecx, 12) && has(one.ecx, 29);  // and FMA, F16C
  if (!avx2) return found;
  found.push_back(&avx2_kernels);

  const bool avx512 = zmm && has(seven.ebx, 16) && has(seven.ebx, 17) && has(seven.ebx, 30) && has(seven.ebx, 31);
  if (!avx512) return found;
  found.push_back(&avx512_kernels);

  if (!has(seven_one.eax, 5)) return found;
  found.push_back(&avx512_bf16_kernels);

  if (tiles && has(seven.edx, 22) && has(seven.edx, 24) && request_tiles()) found.push_back(&amx_kernels);
  return found;
}

#else

std::vector<const Kernels*> find_supported() { return {&baseline_kernels}; }

#endif

const Kernels& choose() {
  const auto& supported = supported_kernels();
  const char* wanted = std::getenv("HYBRID_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *supported.back();
  std::string names;
  for (const Kernels* table : supported) {
    if (std::string_view(wanted) == table->name) return *table;
    names += concat(names.empty() ? "" : ", ", table->name);
  }
  throw std::invalid_argument(concat("HYBRID_CPU_ISA is '", wanted, "', but this CPU runs: ", names));
}

}  // namespace

const std::vector<const Kernels*>& supported_kernels() {
  static const std::vector<const Kernels*> supported = find_supported();
  return supported;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

void linear(const Linear& args) { kernels().linear(args); }
void linear_silu_mul(const LinearSiluMul& args) {
  linear({args.gate_up, args.x, args.weight, args.bias, 2 * args.out.shape[1], args.k, args.stream});
  silu_mul({args.out, args.gate_up, args.stream});
}
void rms_norm(const RmsNorm& args) { kernels().rms_norm(args); }
void norm_linear(const NormLinear& args) {
  rms_norm({args.normed, args.x, args.weight, args.residual, args.sum, args.eps, args.begins_residual, args.stream});
  if (args.gate_up.defined())
    linear_silu_mul({args.out, args.normed, args.product_weight, args.bias, args.gate_up, args.k, args.stream});
  else
    linear({args.out, args.normed, args.product_weight, args.bias, args.n, args.k, args.stream});
}
void rotate_and_store(const RotateAndStore& args) { kernels().rotate_and_store(args); }
void silu_mul(const SiluMul& args) { kernels().silu_mul(args); }
void paged_attention(const PagedAttention& args) { kernels().paged_attention(args); }
void sample(const Sample& args) { kernels().sample(args); }

}  // namespace hybrid::cpu
