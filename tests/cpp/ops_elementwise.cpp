#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "ops/cpu/isa.h"
#include "ops/cpu/thread_pool.h"
#include "refusal.h"
#include "strided_tensor.h"

namespace hybrid {
namespace {

// Calls body(kernels, dtype) for every instruction set of this machine and every float type.
void for_every_kernel(const std::function<void(const cpu::Kernels&, DType)>& body) {
  for (const cpu::Kernels* kernels : cpu::supported_kernels())
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      SCOPED_TRACE(testing::Message() << kernels->name << " " << name_of(dtype));
      body(*kernels, dtype);
    }
}

// Half a unit in the last place of the type, and what f32 arithmetic adds.
double tolerance(DType dtype) { return dtype == DType::f32 ? 2e-6 : dtype == DType::bf16 ? 0x1.01p-8 : 0x1.01p-11; }

float rounded(DType dtype, float x) {
  return by_dtype(dtype, [&]<class T>() { return static_cast<float>(static_cast<T>(x)); });
}

TEST(RmsNorm, matches_a_plain_loop_for_any_width_and_row_stride) {
  std::mt19937 generator(1);
  for_every_kernel([&](const cpu::Kernels& kernels, DType dtype) {
    for (int64_t dim : {1, 7, 16, 63, 64, 576, 1001}) {
      const StridedTensor x = StridedTensor::random(dtype, {5, dim}, generator, dim + 3);
      const StridedTensor weight = StridedTensor::random(dtype, {dim}, generator);
      StridedTensor out(dtype, {5, dim}, dim + 1);
      kernels.rms_norm({out, x, weight, {}, {}, 1e-5f, false, nullptr});
      for (int64_t row = 0; row < 5; ++row) {
        double sum = 0.0;
        for (int64_t i = 0; i < dim; ++i) sum += double{x.at(row, i)} * x.at(row, i);
        const double scale = 1.0 / std::sqrt(sum / static_cast<double>(dim) + 1e-5);
        for (int64_t i = 0; i < dim; ++i) {
          const double expected = x.at(row, i) * scale * weight.at(i);
          ASSERT_NEAR(out.at(row, i), expected, tolerance(dtype) * std::abs(expected) + 1e-7)
              << dim << " " << row << " " << i;
        }
      }
    }
  });
}

TEST(RmsNorm, with_a_residual_adds_in_place_and_norms_what_it_stored) {
  std::mt19937 generator(2);
  for_every_kernel([&](const cpu::Kernels& kernels, DType dtype) {
    for (int64_t dim : {3, 64, 577}) {
      const StridedTensor x = StridedTensor::random(dtype, {4, dim}, generator);
      const StridedTensor weight = StridedTensor::random(dtype, {dim}, generator);
      const StridedTensor before = StridedTensor::random(dtype, {4, dim}, generator, dim + 2);
      StridedTensor residual = before, out(dtype, {4, dim}), expected(dtype, {4, dim});
      kernels.rms_norm({out, x, weight, residual, {}, 1e-6f, false, nullptr});
      kernels.rms_norm({expected, residual, weight, {}, {}, 1e-6f, false, nullptr});
      for (int64_t row = 0; row < 4; ++row) {
        ASSERT_TRUE(out.row_equals(row, expected, row));
        for (int64_t i = 0; i < dim; ++i)
          ASSERT_EQ(residual.at(row, i), rounded(dtype, before.at(row, i) + x.at(row, i)));
      }
    }
  });
}

TEST(RmsNorm, may_leave_the_residual_as_it_was_and_write_the_sum_elsewhere) {
  std::mt19937 generator(2);
  for_every_kernel([&](const cpu::Kernels& kernels, DType dtype) {
    for (bool begins : {false, true}) {
      constexpr int64_t dim = 77;
      const StridedTensor x = StridedTensor::random(dtype, {4, dim}, generator);
      const StridedTensor weight = StridedTensor::random(dtype, {dim}, generator);
      const StridedTensor before = StridedTensor::random(DType::f32, {4, dim}, generator, dim + 2);
      StridedTensor in_place = before, residual = before, sum(DType::f32, {4, dim}, dim + 5);
      StridedTensor expected(dtype, {4, dim}), out(dtype, {4, dim});
      kernels.rms_norm({expected, x, weight, in_place, {}, 1e-6f, begins, nullptr});
      kernels.rms_norm({out, x, weight, residual, sum, 1e-6f, begins, nullptr});
      for (int64_t row = 0; row < 4; ++row) {
        ASSERT_TRUE(out.row_equals(row, expected, row));
        ASSERT_TRUE(sum.row_equals(row, in_place, row));
        ASSERT_TRUE(residual.row_equals(row, before, row));
      }
    }
  });
}

TEST(RmsNorm, keeps_a_float_residual_of_16_bit_rows_unrounded) {
  std::mt19937 generator(2);
  for_every_kernel([&](const cpu::Kernels& kernels, DType dtype) {
    constexpr int64_t dim = 577;
    const StridedTensor x = StridedTensor::random(dtype, {4, dim}, generator);
    const StridedTensor weight = StridedTensor::random(dtype, {dim}, generator);
    const StridedTensor before = StridedTensor::random(DType::f32, {4, dim}, generator, dim + 2);
    StridedTensor residual = before, out(dtype, {4, dim});
    kernels.rms_norm({out, x, weight, residual, {}, 1e-6f, false, nullptr});
    for (int64_t row = 0; row < 4; ++row) {
      double sum = 0.0;
      for (int64_t i = 0; i < dim; ++i) {
        ASSERT_EQ(residual.at(row, i), before.at(row, i) + x.at(row, i));
        sum += double{residual.at(row, i)} * residual.at(row, i);
      }
      const double scale = 1.0 / std::sqrt(sum / dim + 1e-6);
      for (int64_t i = 0; i < dim; ++i) {
        const double expected = residual.at(row, i) * scale * weight.at(i);
        ASSERT_NEAR(out.at(row, i), expected, tolerance(dtype) * std::abs(expected) + 1e-7);
      }
    }
  });
}

TEST(RmsNorm, that_begins_the_residual_equals_one_that_adds_to_zeros) {
  std::mt19937 generator(2);
  for_every_kernel([&](const cpu::Kernels& kernels, DType dtype) {
    for (DType sum : {dtype, DType::f32}) {
      constexpr int64_t dim = 77;
      StridedTensor x = StridedTensor::random(dtype, {4, dim}, generator);
      by_dtype(dtype, [&]<class T>() { x.view().as<T>()[3] = static_cast<T>(-0.0f); });
      const StridedTensor weight = StridedTensor::random(dtype, {dim}, generator);
      StridedTensor zeros(sum, {4, dim}, dim + 2), used = StridedTensor::random(sum, {4, dim}, generator, dim + 2);
      StridedTensor expected(dtype, {4, dim}), out(dtype, {4, dim});
      kernels.rms_norm({expected, x, weight, zeros, {}, 1e-6f, false, nullptr});
      kernels.rms_norm({out, x, weight, used, {}, 1e-6f, true, nullptr});
      for (int64_t row = 0; row < 4; ++row) {
        ASSERT_TRUE(out.row_equals(row, expected, row));
        ASSERT_TRUE(used.row_equals(row, zeros, row));
      }
    }
  });
}

TEST(RmsNorm, may_write_over_its_input) {
  std::mt19937 generator(3);
  for_every_kernel([&](const cpu::Kernels& kernels, DType dtype) {
    StridedTensor x = StridedTensor::random(dtype, {3, 100}, generator), out(dtype, {3, 100});
    const StridedTensor weight = StridedTensor::random(dtype, {100}, generator);
    kernels.rms_norm({out, x, weight, {}, {}, 1e-5f, false, nullptr});
    kernels.rms_norm({x, x, weight, {}, {}, 1e-5f, false, nullptr});
    for (int64_t row = 0; row < 3; ++row) EXPECT_TRUE(out.row_equals(row, x, row));
  });
}

TEST(SiluMul, matches_a_plain_loop_also_far_out) {
  std::mt19937 generator(5);
  for_every_kernel([&](const cpu::Kernels& kernels, DType dtype) {
    for (int64_t dim : {1, 15, 64, 1537}) {
      StridedTensor x = StridedTensor::random(dtype, {3, 2 * dim}, generator, 2 * dim + 4);
      by_dtype(dtype, [&]<class T>() {
        for (int64_t i = 0; i < 3; ++i)
          x.view().as<T>()[i * x.view().strides[0]] = static_cast<T>(i == 0 ? -200.0f : 200.0f);
      });
      StridedTensor out(dtype, {3, dim});
      kernels.silu_mul({out, x, nullptr});
      for (int64_t row = 0; row < 3; ++row)
        for (int64_t i = 0; i < dim; ++i) {
          const double gate = x.at(row, i), expected = gate / (1.0 + std::exp(-gate)) * x.at(row, dim + i);
          ASSERT_NEAR(out.at(row, i), expected, tolerance(dtype) * std::abs(expected) + 1e-7) << gate;
        }
    }
  });
}

TEST(Elementwise, passes_nan_on_and_keeps_it_in_its_row) {
  for_every_kernel([&](const cpu::Kernels& kernels, DType dtype) {
    std::mt19937 generator(6);
    StridedTensor x = StridedTensor::random(dtype, {3, 64}, generator);
    by_dtype(dtype, [&]<class T>() { x.view().as<T>()[64 + 5] = static_cast<T>(NAN); });
    StridedTensor gated(dtype, {3, 32}), normed(dtype, {3, 64});
    kernels.silu_mul({gated, x, nullptr});
    kernels.rms_norm({normed, x, StridedTensor::random(dtype, {64}, generator), {}, {}, 1e-5f, false, nullptr});
    for (int64_t row = 0; row < 3; ++row) {
      for (int64_t i = 0; i < 32; ++i) EXPECT_EQ(std::isnan(gated.at(row, i)), row == 1 && i == 5);
      for (int64_t i = 0; i < 64; ++i) EXPECT_EQ(std::isnan(normed.at(row, i)), row == 1);
    }
  });
}

// F-21: what a request gets must not depend on its batch mates, nor on the number of threads.
TEST(Elementwise, gives_a_row_the_same_bits_alone_and_in_a_batch) {
  std::mt19937 generator(7);
  constexpr int64_t rows = 70, dim = 1000;
  for_every_kernel([&](const cpu::Kernels& kernels, DType dtype) {
    const StridedTensor x = StridedTensor::random(dtype, {rows, dim}, generator);
    const StridedTensor weight = StridedTensor::random(dtype, {dim}, generator);
    StridedTensor alone(dtype, {rows, dim}), together(dtype, {rows, dim});
    StridedTensor gated_alone(dtype, {rows, dim / 2}), gated_together(dtype, {rows, dim / 2});
    for (int64_t row = 0; row < rows; ++row) {
      kernels.rms_norm({alone.rows(row, 1), x.rows(row, 1), weight, {}, {}, 1e-5f, false, nullptr});
      kernels.silu_mul({gated_alone.rows(row, 1), x.rows(row, 1), nullptr});
    }
    for (int threads : {1, 2, 3}) {
      cpu::set_num_threads(threads);
      kernels.rms_norm({together, x, weight, {}, {}, 1e-5f, false, nullptr});
      kernels.silu_mul({gated_together, x, nullptr});
      for (int64_t row = 0; row < rows; ++row) {
        ASSERT_TRUE(together.row_equals(row, alone, row));
        ASSERT_TRUE(gated_together.row_equals(row, gated_alone, row));
      }
    }
    cpu::set_num_threads(0);
  });
}

TEST(Elementwise, refuses_wrong_arguments_with_the_numbers) {
  StridedTensor x(DType::f32, {2, 8}), narrow(DType::f32, {2, 3}), weight(DType::f32, {8}), half(DType::f16, {8});
  const StridedTensor whole = StridedTensor::of({0, 9});
  EXPECT_EQ(message_of([&] { rms_norm({x, x, half, {}, {}, 1e-5f, false, nullptr}); }),
            "rms_norm: weight is float16, expected float32");
  EXPECT_EQ(message_of([&] { rms_norm({x, x, weight, narrow, {}, 1e-5f, false, nullptr}); }),
            "rms_norm: residual has shape [2, 3], expected [2, 8]");
  EXPECT_EQ(message_of([&] { silu_mul({narrow, x, nullptr}); }), "silu_mul: x has shape [2, 8], expected [2, 6]");
  EXPECT_EQ(message_of([&] { silu_mul({whole, whole, nullptr}); }),
            "silu_mul: out is int32, expected float32, bfloat16 or float16");
}

}  // namespace
}  // namespace hybrid
