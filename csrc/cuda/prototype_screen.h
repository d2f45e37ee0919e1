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
  bool along_depth, vector_x,
      vector_p;             // how elements lie next to each other, and whether 16 bytes may be read at once
  int grouped;              // samples in a tile, where a tile holds more than one; else 1
  int64_t tiles;            // of the patches of a sample
  int64_t splits, columns;  // blocks along the patches; along the prototypes
  Lists lists;              // what comes out: scores, or distances in float64 where they are verified
  const double* least;      // of each pair: the patches that reach it are verified; null: none are
  const double* length;     // of each prototype, where they are verified
  double bound;             // error of a score as a fraction of its terms
};

// Below this squared length, sums of squares and products lose precision to underflow.
template <class C>
constexpr C LEAST_SQUARE = sizeof(C) == 4 ? C(0x1p-80) : C(0x1p-800);

// How far a score may be from that of the direct form in float64: by its own rounding, that of the direct form, and
// underflow.
template <class Score, class C>
__device__ inline C score_error(const Geometry& g, Metric metric, C bound, C square_x, C length_p) {
  const C direct = static_cast<C>(g.depth + 16) * C(0x1p-52), tiny = sizeof(Score) == 4 ? C(0x1p-100) : C(0x1p-900);
  if (metric == COSINE)
    return (2 * bound + 8 * direct) * length_p + (sizeof(Score) == 4 ? C(0x1p-60) : tiny) * (1 + length_p);
  const C length_x = sqrt(square_x), both = length_x + length_p;
  return bound * (length_x * length_p + square_x / 2) + direct * both * both + tiny * (1 + both);
}

// How scores are computed. The first two give the float64 and float32 arithmetic of the inputs, the others tensor
// cores.
enum class Arithmetic { IEEE, TF32X3, TF32, BF16, F16 };

// The tile of an arithmetic: patches and prototypes.
constexpr int COLUMNS = 64;
constexpr int rows_of(Dtype dtype) { return dtype == Dtype::f64 ? 64 : 128; }

const char* screen_simt(const Screen& screen, Dtype dtype, void* stream);
const char* screen_tf32(const Screen& screen, Dtype dtype, Arithmetic arithmetic, void* stream);
const char* screen_half(const Screen& screen, Dtype dtype, Arithmetic arithmetic, void* stream);

}  // namespace protofast
