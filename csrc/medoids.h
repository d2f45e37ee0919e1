// What k-medoids kernels are given; see protofast/_ops/selection.py.
#pragma once

#include "selection.h"

namespace protofast {

// indices (k) holds the start, and what became of it.
struct KMedoids {
  PointClouds points;  // one cloud
  Measure measure;
  int64_t k, max_iter;
  bool refine;
  int64_t* indices;
  bool* settled;
};

}  // namespace protofast
