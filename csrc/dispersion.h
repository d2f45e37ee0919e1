// What dispersion kernels are given; see protofast/_ops/selection.py.
#pragma once

#include "selection.h"

namespace protofast {

struct FarthestPair {
  PointClouds points;  // one cloud
  Measure measure;
  int64_t* pair;  // (2)
  double* distance;
};

// Swaps of chosen points, at most so many. indices (k) holds the choice, and what became of it; labels and distances
// (count) are those of k-center.
struct MaxMinSwaps {
  PointClouds points;
  Measure measure;
  int64_t k, swaps;
  int64_t* indices;
  const int64_t* labels;
  const double* distances;
  double* smallest;
};

// Choices by sums, after the `given` first of indices (k), then sweeps of swaps, at most so many.
struct MaxSum {
  PointClouds points;
  Measure measure;
  int64_t given, k, sweeps;
  int64_t* indices;
  double *total, *detour;
};

}  // namespace protofast
