// What selection kernels are given. What a value is, to the bit, stands in protofast/_ops/selection.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "scratch.h"

namespace protofast {

// Numbered as in protofast/_ops/selection.py.
enum class Measure : int64_t { euclidean, sqeuclidean, cosine, manhattan, precomputed };
enum class Engine : int64_t { automatic, plain, boxes, pool };

// Clouds of points: element (b, i, c) is at b·cloud + i·row + c·column. `allowed` is (clouds, count), or null for all.
struct PointClouds {
  const void* data;
  Dtype dtype;
  int64_t clouds, count, dim;
  int64_t cloud, row, column;
  const bool* allowed;
};

// Farthest-first traversal, after the `given` first choices of `initial` (clouds, given). indices and radii are
// (clouds, k), labels and distances (clouds, count).
struct KCenter {
  PointClouds points;
  Measure measure;
  Engine engine;
  const int64_t* initial;
  int64_t given, k;
  bool assign;  // whether labels and distances are wanted; they may be written to either way
  int64_t* indices;
  double* radii;
  int64_t* labels;
  double* distances;
  int32_t device;
  Scratch scratch;
};

// Further centers for one cloud of points. nearest (count) is null where there is none yet.
struct Relax {
  PointClouds points, centers;
  Measure measure;
  const double* nearest;
  double* values;
  int64_t* labels;
  int32_t device;
  Scratch scratch;
};

}  // namespace protofast
