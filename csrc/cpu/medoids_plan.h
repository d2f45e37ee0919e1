// What the loops of k-medoids work on, whatever the instruction set.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#include "selection_plan.h"

namespace protofast {

constexpr int64_t SUM_LANES = 512;  // as in protofast/_ops/selection.py

template <class N>
struct Block {
  Block() = default;
  explicit Block(int64_t count)
      : data(static_cast<N*>(std::aligned_alloc(64, (count * sizeof(N) + 127) / 64 * 64)), &std::free) {}
  N* get() const { return data.get(); }
  std::unique_ptr<N[], void (*)(void*)> data{nullptr, &std::free};
};

// Points in float64, eight at a time: coordinate c of point i is at ((i / 8) · dim + c) · 8 + i % 8. Of a last group
// that is not full, the rest is zero.
struct Panel {
  Panel(const Cloud& cloud, int64_t count)
      : count(count),
        groups((count + 7) / 8),
        dim(cloud.dim + cloud.cosine()),
        manhattan(cloud.manhattan()),
        measure(cloud.measure),
        coordinates(groups * 8 * dim) {}

  const double* group(int64_t g) const { return coordinates.get() + g * 8 * dim; }
  // Groups whose distances to one point are worth a thread.
  int64_t grain() const { return std::max<int64_t>(16, (int64_t{1} << 14) / (dim + 4)); }
  // Points, by groups, that stay in a core's cache while several rows meet them.
  int64_t groups_at_once() const { return std::max<int64_t>(1, (int64_t{1} << 14) / (8 * std::max<int64_t>(dim, 1))); }

  int64_t count, groups, dim;
  bool manhattan;
  Measure measure;
  Block<double> coordinates;
};

// Points in float32, less their mean and scaled to lengths of at most one, for distances that are nearly right: rows as
// tiles take them, and as panels.
struct RoundedMembers {
  int64_t count, dim, depth;
  bool manhattan;
  Block<float> rows, panels;

  // What float32 rounds away from a length, relative to it: in the sum over coordinates, in its root and so many sums.
  double off(int64_t additions) const {
    return (static_cast<double>(dim) * (manhattan ? 1 : 0.5) + static_cast<double>(additions) + 16) * 0x1.1p-24;
  }
};

// What the screen of a swap compares lengths with.
struct ScreenedGains {
  Measure measure;
  float shrink, missed;  // a length is at least shrink · its like in float32 − missed
  double by;             // what makes it one of the points
  const float* reach;    // lengths of `second` at most, scaled
  const double *nearest, *second;
  const int32_t* labels;
};

struct MedoidsLoops {
  void (*coordinates)(const Cloud&, int64_t position, double* to);
  void (*norms)(const Cloud&, double* norms, int64_t begin, int64_t end);
  // Fills groups [begin, end) with the positions of the list.
  void (*fill)(const Cloud&, const int64_t* list, Panel&, int64_t begin, int64_t end);
  // Values, or distances, between a point and those of groups [begin, end), to the bit; `to` has room for all groups.
  void (*values)(const Panel&, const double* x, int64_t begin, int64_t end, double* to);
  void (*distances)(const Panel&, const double* x, int64_t begin, int64_t end, double* to);
  // Adds Σ (x − y) / distance over groups [begin, end), where the distance is above `least`, to g (dim).
  void (*pull)(const Panel&, const double* x, const double* distances, double least, int64_t begin, int64_t end,
               double* g);
  // g · (y − x), and Σ |y − x|.
  void (*slopes)(const Panel&, const double* x, const double* g, int64_t begin, int64_t end, double* dot, double* size);
  // A row of a matrix of distances, as float64.
  void (*row)(const Cloud&, int64_t from, int64_t begin, int64_t end, double* to);
  double (*row_sum)(const Cloud&, int64_t from, const int64_t* list, int64_t count, double* lanes);
  void (*add)(const double* terms, int64_t first, int64_t count, double* lanes);
  double (*sum)(double* lanes);
  // gain and spared of points [first, first + count), from the distances of a candidate to them.
  void (*gains)(const double* distances, const double* nearest, const double* second, const int32_t* labels,
                int64_t first, int64_t count, double* lanes, double* spared);
  // Lengths between the first `height` of the rows and all points of the panels [begin, end), nearly; `to` has a row of
  // `stride` for each.
  void (*lengths)(const RoundedMembers&, const float* rows, int64_t height, int64_t begin, int64_t end, float* to,
                  int64_t stride);
  // Adds to `spared` (by label), and returns, what spared and gain are at most, from those lengths; see
  // medoids_panel.h.
  double (*most_gains)(const ScreenedGains&, const float* lengths, int64_t count, double* spared);
  // Sums of lengths from the rows [begin, end) of a tile grid to all, nearly; see medoids_tiles.h.
  void (*tiles)(const RoundedMembers&, int64_t begin, int64_t rows, double* sums);
  int64_t panel;  // members of a panel
  int64_t lanes;  // of a vector
  int64_t rows;   // of a tile
};

constexpr int64_t TILE_BLOCK = 96;  // members; a multiple of all tiles' rows and panels

}  // namespace protofast
