// Channel purity: what a kernel is given; see protofast/_ops/channels.py.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace protofast {

constexpr double PURITY_FLOOR = 1e-8;

// Pixel p in channel c of sample b lies at data[b·sample + c·channel + at(p)].
struct ChannelMap {
  void* data;
  int64_t sample, channel;
  const int64_t* offset;  // of every pixel; null: they lie in one run

  int64_t at(int64_t pixel) const { return offset ? offset[pixel] : pixel; }
};

// For each of `samples` maps, `pairs` of the `rows` of a rotation, whose element (r, c) lies at r·row + c·column.
struct ChannelPairs {
  int64_t samples, channels, pixels, pairs, rows;
  ChannelMap x;
  const void* rotation;
  int64_t row, column;
  const int64_t* chosen;  // (samples, pairs)
  bool rectify;
  Dtype dtype;
};

struct ChannelPurity {
  ChannelPairs of;
  void* purity;  // (samples, pairs) in float32, or float64 for float64
  int64_t* index;
};

struct ChannelPurityGradient {
  ChannelPairs of;
  const void *grad, *purity;  // (samples, pairs)
  const int64_t* index;
  ChannelMap to_x;    // zeros; null data: not wanted
  void* to_rotation;  // (rows, channels), zeros; null: not wanted
};

}  // namespace protofast
