// The screen: which patches may be a prototype's nearest, by the fast form and in the precision asked for.
#pragma once

#include "prototype.cuh"

namespace protofast {

// The score, the larger the nearer, is x·p − |x|²/2 for SQEUCLIDEAN and EUCLIDEAN, x·p/|x| for COSINE, x·p for DOT.
// +inf stands for what is not finite or was computed out of range: its pair is left to the direct form.
struct Screen {
  Geometry g;
  const void *x, *p;
  const bool* mask;
  Metric metric;
  bool along_depth, vector_x, vector_p;  // how elements lie next to each other, and whether 16 bytes may be read at once
  int grouped;                           // samples in a tile, where a tile holds more than one; else 1
  int64_t tiles;                         // of the patches of a sample
  int64_t splits, columns;               // blocks along the patches; along the prototypes
  Lists lists;                           // what comes out: scores, or distances in float64 where they are verified
  const double* least;                   // of each pair: the patches that reach it are verified; null: none are
  const double* length;                  // of each prototype, where they are verified
  double bound;                          // error of a score as a fraction of its terms
};

// How scores are computed. The first two give the float64 and float32 arithmetic of the inputs, the others tensor cores.
enum class Arithmetic { IEEE, TF32X3, TF32, BF16, F16 };

// The tile of an arithmetic: patches and prototypes.
constexpr int COLUMNS = 64;
constexpr int rows_of(Dtype dtype) { return dtype == Dtype::f64 ? 64 : 128; }

const char* screen_simt(const Screen& screen, Dtype dtype, void* stream);
const char* screen_tf32(const Screen& screen, Dtype dtype, Arithmetic arithmetic, void* stream);
const char* screen_half(const Screen& screen, Dtype dtype, Arithmetic arithmetic, void* stream);

}  // namespace protofast
