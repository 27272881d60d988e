// The AMX kernel of linear over a model of the instructions; where the CPU has them, ops_linear.cpp runs it for real.
#include "amx_model.h"

#define HYBRID_ISA amx_model_isa
#include "linear_case.h"
#include "ops/cpu/kernels/linear.h"

namespace hybrid {
namespace {

void linear_by_model(const Linear& args) { cpu::amx_model_isa::linear(args); }

TEST(LinearAmx, matches_a_plain_loop_on_ragged_shapes) {
  std::mt19937 generator(1);
  const int64_t shapes[][3] = {{1, 1, 1},   {1, 33, 64},  {5, 40, 65},  {16, 32, 32}, {17, 70, 33},
                               {32, 64, 7}, {97, 35, 66}, {130, 5, 20}, {2, 65, 1030}};
  for (const auto& [rows, n, k] : shapes)
    for (bool with_bias : {false, true}) {
      SCOPED_TRACE(testing::Message() << rows << "x" << n << "x" << k);
      const Layer layer(DType::bf16, rows, n, k, generator);
      StridedTensor out(DType::f32, {rows, n}, n + 3);
      layer.run(linear_by_model, out, layer.x, with_bias);
      expect_close(layer, out, with_bias);
    }
  EXPECT_FALSE(amx_model::tiles.configured) << "the tiles were not released";
}

// F-21: what a request gets must not depend on its batch mates.
TEST(LinearAmx, gives_a_row_the_same_bits_alone_and_in_any_batch) {
  std::mt19937 generator(2);
  constexpr int64_t rows = 40;
  const Layer layer(DType::bf16, rows, 70, 1100, generator);
  StridedTensor alone(DType::bf16, {rows, layer.n});
  for (int64_t row = 0; row < rows; ++row) layer.run(linear_by_model, alone.rows(row, 1), layer.x.rows(row, 1), true);
  for (int64_t batch : {2, 15, 16, 17, 31, 32, 33, 40}) {
    StridedTensor together(DType::bf16, {batch, layer.n});
    layer.run(linear_by_model, together, layer.x.rows(rows - batch, batch), true);
    for (int64_t row = 0; row < batch; ++row) ASSERT_TRUE(together.row_equals(row, alone, rows - batch + row));
  }
}

}  // namespace
}  // namespace hybrid
