// Decodes whose sequences begin with the same blocks, and which of them a device had better read together. Knows lists
// of blocks; neither requests nor batches.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/block_pool.h"

namespace hybrid {

// Of a sequence, up to the one that is written, which nobody else has.
using BlockList = std::span<const BlockId>;

// An order that makes neighbours of lists that begin alike.
bool begins_before(BlockList a, BlockList b);
// How many blocks both begin with.
int64_t common_beginning(BlockList a, BlockList b);

// Neighbours in a batch, and how many blocks all of them begin with.
struct PrefixGroup {
  int64_t decodes, blocks;
  bool operator==(const PrefixGroup&) const = default;
};

// Cuts decodes, in the order above, into groups, such that few blocks are read twice. common[i]: blocks that decode i
// begins with like decode i - 1; common[0] says nothing. A group that spares less than a
// sixteenth of `min_blocks` has 0 blocks, as have decodes with nothing in common; if all spare less than `min_blocks`,
// there is no group at all.
std::vector<PrefixGroup> group_prefixes(std::span<const int64_t> common, int64_t min_blocks);

}  // namespace hybrid
