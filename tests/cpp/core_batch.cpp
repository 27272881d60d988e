// The bytes of a batch.
#include <bit>
#include <cstring>
#include <random>

#include "core_harness.h"

namespace hybrid::test {
namespace {

TEST(BatchLayout, columns_are_aligned_and_do_not_overlap) {
  const BatchLayout layout([] {
    Config config = small_config();
    config.num_host_blocks = 5;
    config.validate();
    return config;
  }());
  int64_t end = 0;
  for (const Column& column : layout.columns()) {
    EXPECT_EQ(column.offset % 64, 0) << column.name;
    if (&column == &layout[Col::adjustments])
      EXPECT_EQ(column.offset, layout[Col::kv_blocks].offset) << "the one exception";
    else
      EXPECT_GE(column.offset, end) << column.name;
    EXPECT_GT(column.capacity, 0) << column.name;
    end = column.offset + column.item_bytes * column.capacity;
  }
  EXPECT_LE(end, layout.bytes());
  EXPECT_STREQ(layout[Col::header].name, "header");
  EXPECT_STREQ(layout[Col::kv_blocks].name, "kv_blocks");
  EXPECT_STREQ(layout[Col::adjustments].name, "adjustments");
  EXPECT_EQ(layout[Col::header].offset, 0);
  EXPECT_EQ(layout[Col::slots].item_bytes, 8);
}

TEST(BatchWriter, writes_every_column_of_a_prefill) {
  Machine m(small_config());
  const auto prompt = counting(6);
  RequestSpec spec{.id = 1, .tokens = prompt, .max_tokens = 3, .banned_token_ids = {4}};
  spec.sampling = {.temperature = 0.5,
                   .top_p = 0.25,
                   .min_p = 0.125,
                   .repetition_penalty = 2,
                   .top_k = 99,
                   .num_logprobs = 3,
                   .seed = ~uint64_t{0}};
  m.add(spec);
  const Batch batch = *m.schedule();
  EXPECT_EQ(m.column<int32_t>(batch, Col::token_ids, 6), (std::vector<int32_t>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(m.column<int32_t>(batch, Col::positions, 6), (std::vector<int32_t>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(m.column<int64_t>(batch, Col::slots, 6), (std::vector<int64_t>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(m.column<int32_t>(batch, Col::query_start, 2), (std::vector<int32_t>{0, 6}));
  EXPECT_EQ(m.column<int32_t>(batch, Col::kv_start, 2), (std::vector<int32_t>{0, 2}));
  EXPECT_EQ(m.column<int32_t>(batch, Col::kv_blocks, 2), (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(m.column<int32_t>(batch, Col::sample_rows, 1), std::vector<int32_t>{5});
  EXPECT_EQ(m.column<int32_t>(batch, Col::sample_positions, 1), std::vector<int32_t>{6});
  EXPECT_EQ(m.column<float>(batch, Col::temperature, 1), std::vector<float>{0.5});
  EXPECT_EQ(m.column<float>(batch, Col::top_p, 1), std::vector<float>{0.25});
  EXPECT_EQ(m.column<float>(batch, Col::min_p, 1), std::vector<float>{0.125});
  EXPECT_EQ(m.column<float>(batch, Col::repetition_penalty, 1), std::vector<float>{2});
  EXPECT_EQ(m.column<int32_t>(batch, Col::top_k, 1), std::vector<int32_t>{32}) << "cut to the vocabulary";
  EXPECT_EQ(m.column<int32_t>(batch, Col::num_logprobs, 1), std::vector<int32_t>{3});
  EXPECT_EQ(m.column<int64_t>(batch, Col::seeds, 1), std::vector<int64_t>{-1});
  EXPECT_EQ(m.column<int32_t>(batch, Col::adjust_start, 2), (std::vector<int32_t>{1, 7})) << "behind the blocks";
  const auto entries = m.column<AdjustmentEntry>(batch, Col::adjustments, 7);
  for (int32_t id = 0; id < 6; ++id) {
    const float add = id == 4 ? -std::numeric_limits<float>::infinity() : 0;
    EXPECT_EQ(entries[static_cast<size_t>(id + 1)], (AdjustmentEntry{id, std::bit_cast<int32_t>(add), 1}));
  }
  EXPECT_EQ(batch.max_query_len, 6);
  EXPECT_EQ(batch.max_seq_len, 6);
}

TEST(BatchWriter, the_used_bytes_alone_carry_the_batch) {
  for (const bool adjusted : {false, true}) {
    Config config = small_config();
    Machine m(config);
    const auto prompt = counting(6);
    RequestSpec spec{.id = 1, .tokens = prompt, .max_tokens = 3};
    if (adjusted) spec.banned_token_ids = {4, 7};
    m.add(spec);
    const Batch batch = *m.schedule();
    config.validate();
    const BatchLayout layout(config);
    // Two blocks; two entries of three words behind them, where one begins.
    EXPECT_EQ(batch.bytes_used, layout[Col::kv_blocks].offset + 4 * (adjusted ? 3 + 2 * 3 : 2));
    Arenas copy(config);  // as a device or another rank gets it
    std::memcpy(copy.pointers()[0], m.arenas.pointers()[0], static_cast<size_t>(batch.bytes_used));
    FakeExecutor remote(config, copy);
    EXPECT_EQ(remote.run(batch), m.executor.run(batch));
  }
}

// Captured graphs have fixed addresses, and columns the capacity of the longest contexts: what travels is what is used.
TEST(BatchWriter, adjustments_add_their_own_bytes_to_a_step_and_no_capacity) {
  Config config = small_config();
  config.num_blocks = 1 << 16, config.max_model_len = 131072, config.max_num_seqs = 256;
  config.max_num_batched_tokens = 4096, config.max_adjustments = 600'000;
  Machine m(config);
  config.validate();
  const BatchLayout layout(config);
  const int64_t ragged = layout[Col::kv_blocks].offset;
  EXPECT_GT(layout.bytes() - ragged, 30'000'000) << "the capacity";
  std::mt19937 rng(3);
  for (RequestId id = 0; id < 256; ++id) {
    const auto prompt = counting(9 + static_cast<int64_t>(rng() % 8), static_cast<Token>(id));
    RequestSpec spec{.id = id, .tokens = prompt, .max_tokens = 40};
    if (id % 2 == 0) spec.presence_penalty = 0.5, spec.banned_token_ids = {1, 2, 3};
    if (id % 3 == 0) spec.sampling.repetition_penalty = 1.25;
    m.add(spec);
  }
  Arenas copy(config);
  FakeExecutor remote(config, copy);
  for (int step = 0; step < 20; ++step) {
    const Batch batch = *m.schedule();
    const int64_t blocks = m.column<int32_t>(batch, Col::kv_start, 257)[static_cast<size_t>(batch.num_seqs)];
    EXPECT_GT(batch.num_adjustments, 128 * 3);
    EXPECT_LE(batch.bytes_used, ragged + 4 * blocks + 8 + 12 * batch.num_adjustments);
    EXPECT_LT(batch.bytes_used - ragged, 100'000);
    auto* to = copy.pointers()[static_cast<size_t>(batch.arena)];
    std::memset(to, 0xab, static_cast<size_t>(layout.bytes()));
    std::memcpy(to, m.arenas.pointers()[static_cast<size_t>(batch.arena)], static_cast<size_t>(batch.bytes_used));
    const std::vector<Token> there = remote.run(batch);
    m.in_flight.pop_front();
    EXPECT_EQ(there, m.executor.run(batch));
    m.scheduler.commit(batch.step, there);
  }
}

TEST(BatchWriter, a_batch_in_flight_is_never_overwritten) {
  Config config = small_config();
  config.depth = 2;
  Machine m(config);
  const auto prompt = counting(6);
  m.add(1, prompt, 20);
  m.schedule();
  for (int i = 0; i < 6; ++i) {
    m.schedule();
    EXPECT_NE(m.in_flight[0].arena, m.in_flight[1].arena);
    EXPECT_EQ(m.column<int64_t>(m.in_flight[0], Col::header, 1)[0], m.in_flight[0].step);
    m.commit();
  }
}

TEST(BatchWriter, pads_a_batch_up_to_the_next_size_of_its_kind) {
  Config config = small_config();
  config.decode_sizes = {2, 4};
  config.mixed_seq_sizes = {3};
  config.mixed_token_sizes = {8, 12};
  Machine m(config);
  const auto prompt = counting(6);
  m.add(1, prompt, 20);
  const Batch alone = m.step();
  EXPECT_EQ(alone.padded_tokens, 8);
  EXPECT_EQ(alone.padded_seqs, 3);
  const Batch decode = m.step();
  EXPECT_EQ(decode.padded_tokens, 2);
  EXPECT_EQ(decode.padded_seqs, 2);
  m.add(2, counting(13, 3), 20);
  const Batch large = m.step();
  EXPECT_TRUE(decode.is_padded);
  EXPECT_FALSE(large.is_padded);
  EXPECT_EQ(large.padded_tokens, 14) << "larger than the last size: as it is";
  EXPECT_EQ(large.padded_seqs, 2);
}

TEST(BatchWriter, the_last_token_of_a_prompt_is_no_decode_even_if_it_comes_alone) {
  Config config = small_config();
  config.max_num_batched_tokens = 5;
  Machine m(config);
  m.add(1, counting(6), 20);
  EXPECT_EQ(m.step().num_decodes, 0);
  const Batch last = m.step();
  EXPECT_EQ(last.num_tokens, 1);
  EXPECT_EQ(last.num_decodes, 0);
  EXPECT_EQ(m.step().num_decodes, 1);
}

TEST(Config, sizes_to_pad_to_ascend_and_fit_the_capacities) {
  for (const std::vector<int64_t>& wrong : {std::vector<int64_t>{0}, {2, 2}, {3, 1}, {5}}) {
    Config config = small_config();
    config.decode_sizes = wrong;
    EXPECT_THROW(config.validate(), std::invalid_argument);
  }
}

}  // namespace
}  // namespace hybrid::test
