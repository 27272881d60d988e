#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "ops/cpu/isa.h"

namespace hybrid {
namespace {

TEST(Isa, always_offers_the_baseline_first) { EXPECT_EQ(cpu::supported_kernels().front(), &cpu::baseline_kernels); }

TEST(Isa, offers_each_set_once_and_every_kernel_in_it) {
  for (const cpu::Kernels* kernels : cpu::supported_kernels()) {
    EXPECT_EQ(1, std::count(cpu::supported_kernels().begin(), cpu::supported_kernels().end(), kernels));
    EXPECT_TRUE(kernels->linear && kernels->rms_norm && kernels->rotate_and_store && kernels->silu_mul &&
                kernels->paged_attention && kernels->sample)
        << kernels->name;
  }
}

// kernels() chooses once a process, hence in a child.
std::string chosen_with(const char* wanted) {
  setenv("HYBRID_CPU_ISA", wanted, 1);
  try {
    return cpu::kernels().name;
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
}

void exit_saying(const std::string& text) {
  std::fprintf(stderr, "%s", text.c_str());
  std::exit(0);
}

TEST(IsaDeathTest, the_environment_lowers_the_choice) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  for (const cpu::Kernels* kernels : cpu::supported_kernels())
    EXPECT_EXIT(exit_saying(chosen_with(kernels->name)), testing::ExitedWithCode(0),
                std::string("^") + kernels->name + "$");
  EXPECT_EXIT(exit_saying(chosen_with("")), testing::ExitedWithCode(0),
              std::string("^") + cpu::supported_kernels().back()->name + "$");
}

TEST(IsaDeathTest, asking_for_an_unknown_or_missing_set_is_an_error_that_lists_what_there_is) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(exit_saying(chosen_with("avx1024")), testing::ExitedWithCode(0),
              "HYBRID_CPU_ISA is 'avx1024', but this CPU runs: baseline");
  if (std::string(cpu::supported_kernels().back()->name) == "amx") GTEST_SKIP() << "this CPU has every set";
  EXPECT_EXIT(exit_saying(chosen_with("amx")), testing::ExitedWithCode(0),
              "HYBRID_CPU_ISA is 'amx', but this CPU runs: baseline");
}

}  // namespace
}  // namespace hybrid
