#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "linear_case.h"
#include "ops/cpu/isa.h"
#include "ops/cpu/packed.h"
#include "ops/cpu/thread_pool.h"
#include "refusal.h"

namespace hybrid {
namespace {

constexpr DType float_types[] = {DType::f32, DType::bf16, DType::f16};

TEST(Linear, matches_a_plain_loop_on_ragged_shapes_with_every_instruction_set) {
  std::mt19937 generator(1);
  const int64_t shapes[][3] = {{1, 1, 1},    {1, 31, 7},   {3, 33, 64},  {5, 64, 65},   {13, 70, 33},
                               {25, 40, 31}, {97, 35, 66}, {130, 5, 20}, {2, 65, 1030}, {14, 33, 2049}};
  for (const cpu::Kernels* kernels : cpu::supported_kernels())
    for (DType dtype : float_types)
      for (const auto& [rows, n, k] : shapes)
        for (bool with_bias : {false, true}) {
          SCOPED_TRACE(testing::Message()
                       << kernels->name << " " << name_of(dtype) << " " << rows << "x" << n << "x" << k);
          const Layer layer(dtype, rows, n, k, generator);
          StridedTensor out(DType::f32, {rows, n}, n + 3);
          layer.run(kernels->linear, out, layer.x, with_bias);
          expect_close(layer, out, with_bias);
        }
}

TEST(Linear, rounds_the_same_sums_once_when_the_output_has_the_input_type) {
  std::mt19937 generator(2);
  for (const cpu::Kernels* kernels : cpu::supported_kernels())
    for (DType dtype : {DType::bf16, DType::f16}) {
      const Layer layer(dtype, 7, 45, 50, generator);
      StridedTensor wide(DType::f32, {7, 45}), narrow(dtype, {7, 45});
      layer.run(kernels->linear, wide, layer.x, true);
      layer.run(kernels->linear, narrow, layer.x, true);
      by_dtype(dtype, [&]<class T>() {
        for (int64_t i = 0; i < 7 * 45; ++i)
          ASSERT_EQ(narrow.at(i), static_cast<float>(static_cast<T>(wide.at(i)))) << kernels->name << " element " << i;
      });
    }
}

// F-21: what a request gets must not depend on its batch mates.
TEST(Linear, gives_a_row_the_same_bits_alone_and_in_any_batch) {
  std::mt19937 generator(3);
  constexpr int64_t rows = 70;
  for (const cpu::Kernels* kernels : cpu::supported_kernels())
    for (DType dtype : float_types) {
      const Layer layer(dtype, rows, 100, 1100, generator);
      StridedTensor alone(dtype, {rows, layer.n});
      for (int64_t row = 0; row < rows; ++row)
        layer.run(kernels->linear, alone.rows(row, 1), layer.x.rows(row, 1), true);
      for (int64_t batch = 2; batch <= rows; batch += batch < 20 ? 1 : 7) {
        StridedTensor together(dtype, {batch, layer.n});
        layer.run(kernels->linear, together, layer.x.rows(rows - batch, batch), true);
        for (int64_t row = 0; row < batch; ++row)
          ASSERT_TRUE(together.row_equals(row, alone, rows - batch + row))
              << kernels->name << " " << name_of(dtype) << " row " << row << " of " << batch;
      }
    }
}

TEST(Linear, gives_the_same_bits_with_any_number_of_threads) {
  std::mt19937 generator(4);
  for (const cpu::Kernels* kernels : cpu::supported_kernels())
    for (int64_t rows : {1, 16, 200}) {
      const Layer layer(DType::bf16, rows, 640, 130, generator);
      StridedTensor expected(DType::f32, {rows, layer.n});
      cpu::set_num_threads(1);
      layer.run(kernels->linear, expected, layer.x, false);
      for (int threads : {2, 3}) {
        cpu::set_num_threads(threads);
        StridedTensor out(DType::f32, {rows, layer.n});
        layer.run(kernels->linear, out, layer.x, false);
        EXPECT_EQ(0, std::memcmp(out.view().data, expected.view().data, static_cast<size_t>(rows * layer.n * 4)));
      }
    }
  cpu::set_num_threads(0);
}

TEST(Linear, ignores_what_lies_between_and_behind_the_rows) {
  std::mt19937 generator(5);
  for (const cpu::Kernels* kernels : cpu::supported_kernels())
    for (DType dtype : float_types) {
      const Layer layer(dtype, 3, 33, 35, generator);
      StridedTensor before(DType::f32, {3, 33}), after(DType::f32, {3, 33});
      layer.run(kernels->linear, before, layer.x, false);
      by_dtype(dtype, [&]<class T>() {
        for (int64_t row = 0; row < 2; ++row)
          std::fill_n(layer.x.view().as<T>() + row * layer.x.view().strides[0] + 35, 5, static_cast<T>(NAN));
      });
      layer.run(kernels->linear, after, layer.x, false);
      EXPECT_EQ(0, std::memcmp(before.view().data, after.view().data, 3 * 33 * 4)) << kernels->name;
    }
}

TEST(PackWeight, puts_every_element_in_its_place_and_zeros_elsewhere) {
  std::mt19937 generator(6);
  for (DType dtype : float_types)
    for (const auto& [n, k] : {std::pair{1, 1}, std::pair{33, 31}, std::pair{64, 96}, std::pair{70, 65}}) {
      const StridedTensor weight = StridedTensor::random(dtype, {n, k}, generator), out = packed(weight);
      int64_t zeros = 0;
      for (int64_t i = 0; i < out.view().numel(); ++i) zeros += out.at(i) == 0.0f;
      EXPECT_EQ(zeros, out.view().numel() - int64_t{n} * k);
      by_dtype(dtype, [&]<class T>() {
        for (int64_t row = 0; row < n; ++row)
          for (int64_t i = 0; i < k; ++i) {
            const int64_t panel = row / 32 * 32 * cpu::padded_k(k);
            ASSERT_EQ(out.at(panel + cpu::packed_offset<T>(row % 32, i)), weight.at(row, i));
          }
      });
    }
}

TEST(Embedding, reads_the_same_rows_from_a_packed_and_from_a_plain_table) {
  std::mt19937 generator(7);
  for (DType dtype : float_types)
    for (int64_t dim : {1, 31, 64, 77}) {
      const StridedTensor table = StridedTensor::random(dtype, {100, dim}, generator), packed_table = packed(table);
      const StridedTensor ids = StridedTensor::of({99, 0, 31, 32, 31});
      StridedTensor from_plain(dtype, {5, dim}, dim + 2), from_packed(dtype, {5, dim}, dim + 2);
      embedding({from_plain, ids, table, {}, 100, nullptr});
      embedding({from_packed, ids, packed_table, {}, 100, nullptr});
      for (int64_t row = 0; row < 5; ++row) {
        EXPECT_TRUE(from_plain.row_equals(row, table, ids.view().as<int32_t>()[row]));
        EXPECT_TRUE(from_packed.row_equals(row, table, ids.view().as<int32_t>()[row]));
      }
    }
}

TEST(Linear, names_the_tensor_and_the_numbers_when_an_argument_is_wrong) {
  std::mt19937 generator(8);
  const Layer layer(DType::bf16, 2, 40, 50, generator);
  StridedTensor out(DType::bf16, {2, 40}), narrow(DType::bf16, {2, 39}), half(DType::f16, {2, 40});
  const auto call = [&](const TensorView& to, const TensorView& x, int64_t n, int64_t k) {
    return message_of([&] { linear({to, x, layer.packed_weight, {}, n, k, nullptr}); });
  };
  EXPECT_EQ(call(narrow, layer.x, 40, 50), "linear: out has shape [2, 39], expected [2, 40]");
  EXPECT_EQ(call(out, layer.x, 40, 51), "linear: x has shape [2, 50], expected [any, 51]");
  EXPECT_EQ(call(half, layer.x, 40, 50), "linear: out is float16, expected bfloat16");
  EXPECT_EQ(call(out, layer.x, 0, 50), "linear: n is 0 and k is 50, both must be positive");
  EXPECT_EQ(call(out, {}, 40, 50), "linear: x is missing");
  TensorView transposed = layer.x.view();
  std::swap(transposed.strides[0], transposed.strides[1]);
  EXPECT_EQ(call(out, transposed, 40, 50), "linear: x: the last dimension must be contiguous, its stride is 55");
  TensorView elsewhere = out.view();
  elsewhere.device = Device::cuda;
  EXPECT_EQ(call(elsewhere, layer.x, 40, 50), "linear: out and x are on different devices");
}

TEST(Embedding, a_negative_id_stands_for_a_token_of_the_step_before) {
  std::mt19937 generator(8);
  const StridedTensor table = StridedTensor::random(DType::bf16, {100, 64}, generator);
  const StridedTensor ids = StridedTensor::of({7, -1, -3}), picked = StridedTensor::of({40, 41, 42});
  StridedTensor out(DType::bf16, {3, 64});
  embedding({out, ids, table, picked, 100, nullptr});
  for (int64_t row : {0, 1, 2})
    EXPECT_TRUE(out.row_equals(row, table, std::array{7, 40, 42}[static_cast<size_t>(row)]));
  const StridedTensor beyond = StridedTensor::of({7, -1, -4});
  EXPECT_EQ(message_of([&] { embedding({out, beyond, table, picked, 100, nullptr}); }),
            "embedding: ids holds -4, expected values in [-3, 100)");
}

TEST(Embedding, refuses_ids_outside_the_table) {
  StridedTensor out(DType::f32, {2, 4}), table(DType::f32, {10, 4});
  for (int32_t bad : {-1, 10}) {
    const StridedTensor ids = StridedTensor::of({3, bad});
    EXPECT_EQ(message_of([&] { embedding({out, ids, table, {}, 10, nullptr}); }),
              "embedding: ids holds " + std::to_string(bad) + ", expected values in [0, 10)");
  }
}

TEST(Linear, does_nothing_for_no_rows) {
  std::mt19937 generator(9);
  const Layer layer(DType::f32, 1, 8, 8, generator);
  linear(
      {StridedTensor(DType::f32, {0, 8}), StridedTensor(DType::f32, {0, 8}), layer.packed_weight, {}, 8, 8, nullptr});
}

TEST(LinearSiluMul, has_the_bits_of_linear_and_silu_mul_apart) {
  std::mt19937 generator(10);
  for (DType dtype : float_types)
    for (const auto& [rows, dim, k] : {std::tuple<int64_t, int64_t, int64_t>{1, 33, 70}, {9, 64, 31}}) {
      const Layer layer(dtype, rows, 2 * dim, k, generator);
      for (bool with_bias : {false, true}) {
        const TensorView bias = with_bias ? layer.bias.view() : TensorView{};
        StridedTensor gate_up(dtype, {rows, 2 * dim}), expected(dtype, {rows, dim}), out(dtype, {rows, dim}, dim + 3);
        layer.run(linear, gate_up, layer.x, with_bias);
        silu_mul({expected, gate_up, nullptr});
        linear_silu_mul({out, layer.x, layer.packed_weight, bias, gate_up, k, nullptr});
        for (int64_t row = 0; row < rows; ++row) EXPECT_TRUE(out.row_equals(row, expected, row));
      }
    }
}

TEST(LinearSiluMul, names_the_tensor_and_the_numbers_when_an_argument_is_wrong) {
  std::mt19937 generator(11);
  const Layer layer(DType::bf16, 2, 40, 50, generator);
  StridedTensor out(DType::bf16, {2, 20}), half(DType::f16, {2, 20}), wide(DType::bf16, {2, 40});
  StridedTensor gate_up(DType::bf16, {2, 40}), narrow(DType::bf16, {2, 39}), gaps(DType::bf16, {2, 40}, 48);
  const auto call = [&](const TensorView& to, const TensorView& between, int64_t k) {
    return message_of([&] { linear_silu_mul({to, layer.x, layer.packed_weight, {}, between, k, nullptr}); });
  };
  EXPECT_EQ(call(out, narrow, 50), "linear_silu_mul: gate_up has shape [2, 39], expected [2, 40]");
  EXPECT_EQ(call(out, gaps, 50), "linear_silu_mul: gate_up must be contiguous");
  EXPECT_EQ(call(half, gate_up, 50), "linear_silu_mul: out is float16, expected bfloat16");
  EXPECT_EQ(call(out, gate_up, 51), "linear_silu_mul: x has shape [2, 50], expected [any, 51]");
  EXPECT_NE(call(wide, gate_up, 50).find("linear_silu_mul: weight has shape"), std::string::npos);
  EXPECT_EQ(call(out, {}, 50), "linear_silu_mul: gate_up is missing");
}

}  // namespace
}  // namespace hybrid
