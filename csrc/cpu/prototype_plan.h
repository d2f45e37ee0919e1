// How the search for the nearest patches is divided among threads, and what it keeps.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "../prototype.h"

namespace protofast {

// Does (distance, index) come before (other, at)? NaN before all numbers, ties to the lower index, "none" (-1) last.
inline bool nearer(double distance, int64_t index, double other, int64_t at) {
  if (at < 0) return true;
  const bool lost = distance != distance, other_lost = other != other;
  if (lost || other_lost) return lost && (!other_lost || index < at);
  return distance < other || (distance == other && index < at);
}

// The nearest patches so far, in order: (part, sample, prototype, topk). Distances are squared for EUCLIDEAN.
struct Winners {
  double* distance;
  int64_t* index;
  int64_t topk;

  void clear(int64_t row) const {
    std::fill_n(distance + row * topk, topk, std::numeric_limits<double>::infinity());
    std::fill_n(index + row * topk, topk, -1);
  }

  void offer(int64_t row, double value, int64_t at) const {
    double* d = distance + row * topk;
    int64_t* i = index + row * topk;
    int64_t to = topk - 1;
    if (!nearer(value, at, d[to], i[to])) return;
    for (; to > 0 && nearer(value, at, d[to - 1], i[to - 1]); --to) d[to] = d[to - 1], i[to] = i[to - 1];
    d[to] = value, i[to] = at;
  }
};

struct Range {
  int64_t first, last;

  int64_t size() const { return last - first; }
  // The `part`-th of `parts` runs of nearly one length, whose ends are multiples of `unit`.
  Range split(int64_t part, int64_t parts, int64_t unit = 1) const {
    const int64_t units = (size() + unit - 1) / unit;
    return {std::min(last, first + units * part / parts * unit),
            std::min(last, first + units * (part + 1) / parts * unit)};
  }
};

// What tiles are made of: numbers as they are, pairs of bfloat16, or fours of bytes.
enum class Screen { real, pairs, bytes };

// Patches that are packed together: about a MiB, enough that packing the prototypes costs little beside using them.
inline int64_t rows_at_once(const PrototypeShape& shape, int64_t element) {
  const int64_t bytes = std::max<int64_t>(1, shape.channels * shape.window()) * element;
  return std::clamp<int64_t>((int64_t{1} << 20) / bytes, 256, 1024);
}

struct SearchTask {
  Range samples, patches, prototypes;
  int64_t part;
};

// Samples first; then prototypes; then, for few of both, the patches, whose winners are brought together at the end.
struct SearchPlan {
  SearchPlan(const PrototypeShape& shape, int64_t threads, int64_t panel, int64_t element)
      : shape(shape), panel(panel), unit(rows_at_once(shape, element)) {
    const int64_t samples = shape.samples;
    ranges = samples % threads == 0 || samples >= 16 * threads ? std::min(samples, threads) : samples;
    groups = std::min(threads / std::gcd(ranges, threads), (shape.prototypes + panel - 1) / panel);
    parts = std::clamp<int64_t>(threads / (ranges * groups), 1, (shape.patches() + unit - 1) / unit);
  }

  int64_t tasks() const { return ranges * groups * parts; }

  SearchTask task(int64_t i) const {
    const int64_t part = i % parts, group = i / parts % groups, range = i / (parts * groups);
    return {Range{0, shape.samples}.split(range, ranges), Range{0, shape.patches()}.split(part, parts, unit),
            Range{0, shape.prototypes}.split(group, groups, panel), part};
  }

  const PrototypeShape& shape;
  int64_t panel, unit, ranges, groups, parts;
};

// Where the elements of a patch lie, relative to its first: (channel, pixel of the window).
inline std::vector<int64_t> patch_offsets(const PrototypeShape& shape, const FeatureMap& x) {
  std::vector<int64_t> window, all;
  const int64_t* k = shape.kernel;
  for (int64_t a = 0; a < k[0]; ++a)
    for (int64_t b = 0; b < k[1]; ++b)
      for (int64_t c = 0; c < k[2]; ++c)
        for (int64_t d = 0; d < k[3]; ++d)
          window.push_back(a * x.stride[0] + b * x.stride[1] + c * x.stride[2] + d * x.stride[3]);
  for (int64_t channel = 0; channel < shape.channels; ++channel)
    for (int64_t pixel : window) all.push_back(channel * x.channel + pixel);
  return all;
}

// The flat index n over `size`, as a place in x.
inline int64_t place(const int64_t (&size)[AXES], const FeatureMap& x, int64_t n) {
  int64_t at = 0;
  for (int axis = AXES - 1; axis > 0 && n > 0; --axis) {
    if (size[axis] == 1) continue;
    at += n % size[axis] * x.stride[axis];
    n /= size[axis];
  }
  return at + n * x.stride[0];
}

// Memory in whole cache lines, as large as was ever asked.
template <class T>
class Buffer {
 public:
  T* get(size_t count) {
    if (count > size_) {
      size_ = (count * sizeof(T) + 63) / 64 * 64 / sizeof(T) + 1;
      data_.reset(static_cast<T*>(std::aligned_alloc(64, (size_ * sizeof(T) + 63) / 64 * 64)));
      if (!data_) throw std::bad_alloc();
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
  size_t size_ = 0;
};

}  // namespace protofast
