// The screening kernels, for every arithmetic. A block goes through tiles of patches, all against one tile of
// prototypes, by way of double-buffered shared memory.
#pragma once

#include "mma.cuh"
#include "prototype_screen.h"

namespace protofast {
namespace {

constexpr int DEEP = 16;  // words of depth in a chunk
constexpr int QUAD = 4;   // words that a thread stages at once
constexpr int PAD = 8;    // keeps fragments of tensor cores, and vectors, in different banks

template <class T>
__device__ inline double score_key(T score) {
  return -static_cast<double>(score);
}

template <class T>
struct alignas(16) Vector {
  T lane[16 / sizeof(T)];
};

// --- arithmetic: words of a tile, and what a thread makes of a chunk of them ---

// FMAs: RM × RN results a thread, in vectors of 16 bytes; a warp covers 4 × 8 threads.
template <class C, int RM, int RN>
struct Simt {
  using Word = C;
  using Score = C;
  static constexpr int PER_WORD = 1, ROWS = 16 * RM, OWN_ROWS = RM, OWN_COLUMNS = RN, SHARERS = 16;
  static constexpr int V = 16 / sizeof(C);
  static_assert(16 * RN == COLUMNS && RM % V == 0 && RN % V == 0);

  __device__ static int row_group() { return threadIdx.x / LANES % 4 * 4 + threadIdx.x % 4; }
  __device__ static int column_group() { return threadIdx.x / LANES / 4 * 8 + threadIdx.x % LANES / 4; }
  __device__ static int row(int i) { return i / V * (16 * V) + row_group() * V + i % V; }
  __device__ static int column(int j) { return j / V * (16 * V) + column_group() * V + j % V; }
  __device__ static int sharer() { return row_group(); }

  template <class T>
  __device__ static Word pack(const T* from, int) {
    return widen(*from);
  }
  // Rounded as in the tile, so that the norm is that of what is multiplied.
  __device__ static C square(Word word, C sum) { return multiply_add(word, word, sum); }

  __device__ static void run(const Word (&x)[DEEP][ROWS + PAD], const Word (&p)[DEEP][COLUMNS + PAD],
                             C (&sum)[RM][RN]) {
#pragma unroll
    for (int k = 0; k < DEEP; ++k) {
      C a[RM], b[RN];
#pragma unroll
      for (int i = 0; i < RM; i += V)
        *reinterpret_cast<Vector<C>*>(a + i) = *reinterpret_cast<const Vector<C>*>(&x[k][row(i)]);
#pragma unroll
      for (int j = 0; j < RN; j += V)
        *reinterpret_cast<Vector<C>*>(b + j) = *reinterpret_cast<const Vector<C>*>(&p[k][column(j)]);
#pragma unroll
      for (int i = 0; i < RM; ++i)
#pragma unroll
        for (int j = 0; j < RN; ++j) sum[i][j] = multiply_add(a[i], b[j], sum[i][j]);
    }
  }
};

// Tensor cores: 4 × 2 warps of 32 × 32 results. A word is one TF32 or float, or two bfloat16 or half next to each other
// in depth; fragments of all of them lie the same.
template <Arithmetic arithmetic>
struct Mma {
  using Word = uint32_t;
  using Score = float;
  static constexpr bool WIDE = arithmetic == Arithmetic::TF32 || arithmetic == Arithmetic::TF32X3;
  static constexpr int PER_WORD = WIDE ? 1 : 2, ROWS = 128, OWN_ROWS = 4, OWN_COLUMNS = 8, SHARERS = 32;

  __device__ static int row(int i) {
    return threadIdx.x / LANES % 4 * 32 + i / 2 * 16 + i % 2 * 8 + threadIdx.x % LANES / 4;
  }
  __device__ static int column(int j) { return threadIdx.x / LANES / 4 * 32 + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2; }
  __device__ static int sharer() { return threadIdx.x / LANES % 4 * 8 + threadIdx.x % LANES / 4; }

  // The word of elements from[0] and, where it holds two, from[step].
  template <class T>
  __device__ static Word pack(const T* from, int step) {
    if constexpr (arithmetic == Arithmetic::TF32X3) {
      return __float_as_uint(widen(from[0]));
    } else if constexpr (arithmetic == Arithmetic::TF32) {
      return to_tf32(widen(from[0]));
    } else if constexpr (arithmetic == Arithmetic::BF16) {
      __nv_bfloat16 low, high;
      narrow(widen(from[0]), low);
      narrow(widen(from[step]), high);
      return __bfloat16_as_ushort(low) | static_cast<uint32_t>(__bfloat16_as_ushort(high)) << 16;
    } else {
      __half low, high;
      narrow(widen(from[0]), low);
      narrow(widen(from[step]), high);
      return __half_as_ushort(low) | static_cast<uint32_t>(__half_as_ushort(high)) << 16;
    }
  }
  __device__ static float square(Word word, float sum) {
    if constexpr (WIDE) {
      const float value = __uint_as_float(word);
      return multiply_add(value, value, sum);
    } else {
      float low, high;
      if constexpr (arithmetic == Arithmetic::BF16) {
        low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xffff0000);
      } else {
        low = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
        high = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
      }
      return multiply_add(high, high, multiply_add(low, low, sum));
    }
  }

  __device__ static void split(uint32_t word, uint32_t& large, uint32_t& rest) {
    const float value = __uint_as_float(word);
    large = to_tf32(value);
    rest = to_tf32(value - __uint_as_float(large));
  }

  __device__ static void run(const Word (&x)[DEEP][ROWS + PAD], const Word (&p)[DEEP][COLUMNS + PAD],
                             float (&sum)[4][8]) {
    const int depth = threadIdx.x % 4, first_row = row(0),
              first_column = threadIdx.x / LANES / 4 * 32 + threadIdx.x % LANES / 4;
    constexpr int together = arithmetic == Arithmetic::TF32X3 ? 1 : DEEP / 8;  // more would spill
#pragma unroll together
    for (int k = 0; k < DEEP; k += 8) {
      uint32_t b[4][2];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        b[n][0] = p[k + depth][first_column + 8 * n];
        b[n][1] = p[k + depth + 4][first_column + 8 * n];
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int at = first_row + 16 * m;
        const uint32_t a[4] = {x[k + depth][at], x[k + depth][at + 8], x[k + depth + 4][at], x[k + depth + 4][at + 8]};
        uint32_t large_a[4], rest_a[4];
        if constexpr (arithmetic == Arithmetic::TF32X3) {
#pragma unroll
          for (int i = 0; i < 4; ++i) split(a[i], large_a[i], rest_a[i]);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          float &d00 = sum[2 * m][2 * n], &d01 = sum[2 * m][2 * n + 1];
          float &d10 = sum[2 * m + 1][2 * n], &d11 = sum[2 * m + 1][2 * n + 1];
          if constexpr (arithmetic == Arithmetic::BF16) {
            mma_bf16(d00, d01, d10, d11, a, b[n]);
          } else if constexpr (arithmetic == Arithmetic::F16) {
            mma_f16(d00, d01, d10, d11, a, b[n]);
          } else if constexpr (arithmetic == Arithmetic::TF32) {
            mma_tf32(d00, d01, d10, d11, a, b[n]);
          } else {
            uint32_t large_b[2], rest_b[2];
            split(b[n][0], large_b[0], rest_b[0]);
            split(b[n][1], large_b[1], rest_b[1]);
            mma_tf32(d00, d01, d10, d11, rest_a, large_b);  // the small ones first
            mma_tf32(d00, d01, d10, d11, large_a, rest_b);
            mma_tf32(d00, d01, d10, d11, large_a, large_b);
          }
        }
      }
    }
  }
};

// --- a tile ---

template <class E>
struct Shared {
  using Score = typename E::Score;
  using Word = typename E::Word;
  static constexpr int WRITERS = THREADS / (E::ROWS / QUAD);  // threads that share a patch as they stage it, at most
  static constexpr int HALF = COLUMNS / 2;

  union alignas(16) {
    Word x[2][DEEP][E::ROWS + PAD];
    Score scores[HALF][E::ROWS + QUAD];  // once the tile is done
    struct {
      Score score[COLUMNS][E::SHARERS];
      int place[COLUMNS][E::SHARERS];
    } best;  // once all are
  };
  union alignas(16) {
    Word p[2][DEEP][COLUMNS + PAD];
    Score square[WRITERS][E::ROWS];
  };
  int64_t offset[E::ROWS];  // of a patch in x; −1 past the last
  Score scale[E::ROWS], bias[E::ROWS], squared[E::ROWS];
  bool allowed[E::ROWS], something[E::ROWS];  // whether a patch may win; whether it is not all 0
};

// Where row r of a tile comes from: a sample (of the group) and a patch of it.
template <class E>
__device__ inline bool row_place(const Screen& a, int64_t group, int64_t tile, int r, int& member, int& patch) {
  member = a.grouped == 1 ? 0 : r / a.g.patches;
  const int64_t at = a.grouped == 1 ? tile * E::ROWS + r : r % a.g.patches;
  patch = static_cast<int>(at);
  return at < a.g.patches && member < a.grouped && group * a.grouped + member < a.g.samples;
}

template <class E>
__device__ inline void set_rows(const Screen& a, Shared<E>& s, int64_t group, int64_t tile) {
  for (int r = threadIdx.x; r < E::ROWS; r += THREADS) {
    int member, patch;
    const bool there = row_place<E>(a, group, tile, r, member, patch);
    const int64_t sample = group * a.grouped + member;
    s.offset[r] = there ? sample * a.g.sample + place_offset(a.g.grid, a.g.stride, patch) : -1;
    s.allowed[r] = there && (!a.mask || a.mask[sample * a.g.patches + patch]);
    s.something[r] = false;
  }
}

// `count` elements, 16 bytes at a time where there are as many.
template <int count, class T>
__device__ inline void copy_vectors(const T* from, T* to) {
  constexpr int lanes = count * sizeof(T) < 16 ? count : 16 / static_cast<int>(sizeof(T));
  struct alignas(lanes * sizeof(T)) Part {
    T lane[lanes];
  };
#pragma unroll
  for (int i = 0; i < count; i += lanes) *reinterpret_cast<Part*>(to + i) = *reinterpret_cast<const Part*>(from + i);
}

// All scores of a tile before scale and bias, which are left in `s`: of OWN_ROWS × OWN_COLUMNS a thread. Every sum over
// depth has the same order wherever its patch lies, so equal patches tie.
template <class T, class E>
__device__ inline void accumulate(const Screen& a, Shared<E>& s, int64_t first_prototype,
                                  typename E::Score (&sum)[E::OWN_ROWS][E::OWN_COLUMNS]) {
  using Word = typename E::Word;
  using Score = typename E::Score;
  constexpr int D = E::PER_WORD, QUADS = DEEP * E::ROWS / QUAD / THREADS;
  constexpr int ACROSS = E::ROWS / QUAD;    // threads along the patches
  constexpr int ALONG = THREADS / E::ROWS;  // or along depth
  static_assert(QUADS >= 1 && ALONG >= 1 && ALONG * QUADS * QUAD == DEEP && DEEP * COLUMNS == QUAD * THREADS);

  const int thread = threadIdx.x;
  const T* const x = static_cast<const T*>(a.x);
  const int64_t prototype = first_prototype + thread % COLUMNS;
  const T* const p = prototype < a.g.prototypes ? static_cast<const T*>(a.p) + prototype * a.g.depth : nullptr;
  const int p_word = thread / COLUMNS * QUAD;
  const bool norms = a.metric != DOT || a.least;
  const int row = a.along_depth ? thread / ALONG : thread % ACROSS * QUAD;
  const auto word_of = [&](int q) {
    return a.along_depth ? (thread % ALONG + q * ALONG) * QUAD : thread / ACROSS + q * (THREADS / ACROSS);
  };

  alignas(16) T from_x[QUADS][QUAD * D], from_p[QUAD * D];
  Score square[QUAD] = {};
  unsigned something = 0;

  // A run of elements along depth; those past the end are 0.
  const auto read_run = [&](const T* from, int depth, bool vectors, bool spatial, T(&to)[QUAD* D]) {
    if (from && vectors && depth + QUAD * D <= a.g.depth) {
      copy_vectors<QUAD * D>(from + depth, to);
    } else {
#pragma unroll
      for (int i = 0; i < QUAD * D; ++i) {
        to[i] = T{};
        if (from && depth + i < a.g.depth) to[i] = from[spatial ? depth_offset(a.g, depth + i) : depth + i];
      }
    }
  };
  const auto read = [&](int first_word) {
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
      const int depth = (first_word + word_of(q)) * D;
      if (a.along_depth) {
        const int64_t offset = s.offset[row];
        read_run(offset < 0 ? nullptr : x + offset, depth, a.vector_x, true, from_x[q]);
        continue;
      }
#pragma unroll
      for (int d = 0; d < D; ++d) {
        const bool there = depth + d < a.g.depth;
        const int64_t at = there ? depth_offset(a.g, depth + d) : 0;
        if (there && a.vector_x && s.offset[row] >= 0) {
          copy_vectors<QUAD>(x + s.offset[row] + at, from_x[q] + QUAD * d);
        } else {
#pragma unroll
          for (int i = 0; i < QUAD; ++i) {
            from_x[q][QUAD * d + i] = T{};
            if (there && s.offset[row + i] >= 0) from_x[q][QUAD * d + i] = x[s.offset[row + i] + at];
          }
        }
      }
    }
    read_run(p, (first_word + p_word) * D, a.vector_p, false, from_p);
  };
  const auto write = [&](int buffer) {
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
      const int word = word_of(q);
      alignas(16) Word words[QUAD];
#pragma unroll
      for (int i = 0; i < QUAD; ++i)
        words[i] = a.along_depth ? E::pack(from_x[q] + D * i, 1) : E::pack(from_x[q] + i, QUAD);
      if (a.along_depth) {
#pragma unroll
        for (int i = 0; i < QUAD; ++i) s.x[buffer][word + i][row] = words[i];
      } else {
        copy_vectors<QUAD>(words, &s.x[buffer][word][row]);
      }
      if (norms) {
#pragma unroll
        for (int i = 0; i < QUAD; ++i) {
          if (a.along_depth)
            square[0] = E::square(words[i], square[0]);
          else
            square[i] = E::square(words[i], square[i]);
        }
      }
      if (a.metric == COSINE) {
#pragma unroll
        for (int i = 0; i < QUAD * D; ++i)
          if (widen(from_x[q][i]) != 0) something |= a.along_depth ? 1u : 1u << i % QUAD;
      }
    }
#pragma unroll
    for (int i = 0; i < QUAD; ++i) s.p[buffer][p_word + i][thread % COLUMNS] = E::pack(from_p + D * i, 1);
  };

#pragma unroll
  for (int i = 0; i < E::OWN_ROWS; ++i)
#pragma unroll
    for (int j = 0; j < E::OWN_COLUMNS; ++j) sum[i][j] = 0;
  const int words = (a.g.depth + D - 1) / D;
  if (words > 0) {
    read(0);
    write(0);
  }
  __syncthreads();
  int buffer = 0;
  for (int first = 0; first < words; first += DEEP, buffer ^= 1) {
    const bool more = first + DEEP < words;
    if (more) read(first + DEEP);
    E::run(s.x[buffer], s.p[buffer], sum);
    if (more) write(buffer ^ 1);
    __syncthreads();
  }

  // Squares of a patch, from those that staged it, in their order.
  const int writers = a.along_depth ? ALONG : THREADS / ACROSS;
  if (a.along_depth) {
    s.square[thread % ALONG][row] = square[0];
    if (something) s.something[row] = true;
  } else {
#pragma unroll
    for (int i = 0; i < QUAD; ++i) {
      s.square[thread / ACROSS][row + i] = square[i];
      if (something >> i & 1) s.something[row + i] = true;
    }
  }
  __syncthreads();
  for (int r = thread; r < E::ROWS; r += THREADS) {
    Score total = 0;
    for (int w = 0; w < writers; ++w) total += s.square[w][r];
    Score scale = 1, bias = 0;
    if (a.metric == COSINE) {
      constexpr Score least = LEAST_SQUARE<Score>;
      scale = total >= least ? 1 / sqrt(total) : Score(0);
      if (total < least && s.something[r]) bias = NAN;
    } else if (a.metric != DOT) {
      bias = total / -2;
    }
    if (norms && !(total < Score(INFINITY))) bias = NAN;
    s.scale[r] = scale, s.bias[r] = bias, s.squared[r] = total;
  }
  __syncthreads();
}

template <class Score>
__device__ inline Score final_score(Score sum, Score scale, Score bias, bool allowed) {
  const Score score = multiply_add(sum, scale, bias);
  if (!allowed) return -INFINITY;
  return score < Score(INFINITY) ? score : Score(INFINITY);  // NaN too
}

// Blocks of a multiprocessor: as many as registers allow without spills.
template <class E>
constexpr int BLOCKS = sizeof(typename E::Score) == 4 ? 2 : 1;

struct Block {
  int64_t column, split, group;
};

__device__ inline Block block_of(const Screen& a) {
  const int64_t block = blockIdx.x, rest = block / a.columns;
  return {block % a.columns, rest % a.splits, rest / a.splits};
}

// The nearest patch alone. A thread keeps the best of each of its columns, in ascending order of patches.
template <class T, class E>
__global__ void __launch_bounds__(THREADS, BLOCKS<E>) screen_best_kernel(const __grid_constant__ Screen a) {
  using Score = typename E::Score;
  __shared__ Shared<E> s;
  const Block block = block_of(a);
  const int64_t first_prototype = block.column * COLUMNS, each = (a.tiles + a.splits - 1) / a.splits;
  const int64_t last = (block.split + 1) * each < a.tiles ? (block.split + 1) * each : a.tiles;
  // The best so far waits in shared memory, where that is large enough, and leaves its registers to the sums.
  constexpr bool parked = sizeof(Score) == 4;
  __shared__ Score parked_best[parked ? E::OWN_COLUMNS : 1][THREADS];
  __shared__ int parked_place[parked ? E::OWN_COLUMNS : 1][THREADS];
  Score best[E::OWN_COLUMNS];
  int place[E::OWN_COLUMNS];
  const auto park = [&](bool out) {
    if constexpr (parked) {
#pragma unroll
      for (int j = 0; j < E::OWN_COLUMNS; ++j) {
        if (out)
          best[j] = parked_best[j][threadIdx.x], place[j] = parked_place[j][threadIdx.x];
        else
          parked_best[j][threadIdx.x] = best[j], parked_place[j][threadIdx.x] = place[j];
      }
    }
  };
#pragma unroll
  for (int j = 0; j < E::OWN_COLUMNS; ++j) best[j] = -INFINITY, place[j] = NOWHERE;
  park(false);
  for (int64_t tile = block.split * each; tile < last; ++tile) {
    set_rows(a, s, block.group, tile);
    __syncthreads();
    Score sum[E::OWN_ROWS][E::OWN_COLUMNS];
    accumulate<T, E>(a, s, first_prototype, sum);
    park(true);
#pragma unroll
    for (int i = 0; i < E::OWN_ROWS; ++i) {
      const int r = E::row(i), patch = static_cast<int>(tile * E::ROWS) + r;
      const Score scale = s.scale[r], bias = s.bias[r];
      const bool allowed = s.allowed[r];
#pragma unroll
      for (int j = 0; j < E::OWN_COLUMNS; ++j) {
        const Score score = final_score(sum[i][j], scale, bias, allowed);
        if (score > best[j]) best[j] = score, place[j] = patch;
      }
    }
    park(false);
    __syncthreads();
  }
  park(true);
#pragma unroll
  for (int j = 0; j < E::OWN_COLUMNS; ++j) {
    s.best.score[E::column(j)][E::sharer()] = best[j];
    s.best.place[E::column(j)][E::sharer()] = place[j];
  }
  __syncthreads();
  const int64_t prototype = first_prototype + threadIdx.x;
  if (threadIdx.x >= COLUMNS || prototype >= a.g.prototypes) return;
  Entry found;
  for (int i = 0; i < E::SHARERS; ++i) {
    Entry other;
    other.place = s.best.place[threadIdx.x][i];
    if (other.place != NOWHERE) other.key = to_key(score_key(s.best.score[threadIdx.x][i]));
    if (before(other, found)) found = other;
  }
  const int64_t at = a.lists.at(block.group * a.g.prototypes + prototype, block.split);
  a.lists.key[at] = found.key, a.lists.place[at] = found.place;
}

// The nearest `topk` patches, by score; or by exact distance, of the patches whose score may be among the best. The
// scores of a tile go through shared memory, half of the columns at a time, and each column belongs to one warp, which
// keeps its list in the result. Also where a tile holds several samples.
template <class T, class E, bool verify>
__global__ void __launch_bounds__(THREADS, verify ? 1 : BLOCKS<E>)
    screen_list_kernel(const __grid_constant__ Screen a) {
  using Score = typename E::Score;
  using Tile = Shared<E>;
  __shared__ Tile s;
  __shared__ Score worst[COLUMNS];  // in the list, where the tiles are of one sample
  const Block block = block_of(a);
  const int64_t first_prototype = block.column * COLUMNS, each = (a.tiles + a.splits - 1) / a.splits;
  const int64_t begin = block.split * each, last = begin + each < a.tiles ? begin + each : a.tiles;
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, topk = static_cast<int>(a.lists.topk);
  const bool kept = lane < topk;

  if (begin >= last) {  // no tile is left for this split
    for (int c = warp; c < COLUMNS; c += WARPS) {
      const int64_t prototype = first_prototype + c;
      if (prototype >= a.g.prototypes || !kept) continue;
      const int64_t at = a.lists.at(block.group * a.g.prototypes + prototype, block.split) + lane;
      a.lists.key[at] = NOTHING, a.lists.place[at] = NOWHERE;
    }
    return;
  }
  for (int64_t tile = begin; tile < last; ++tile) {
    set_rows(a, s, block.group, tile);
    __syncthreads();
    Score sum[E::OWN_ROWS][E::OWN_COLUMNS];
    accumulate<T, E>(a, s, first_prototype, sum);
    for (int half = 0; half < COLUMNS; half += Tile::HALF) {
#pragma unroll
      for (int i = 0; i < E::OWN_ROWS; ++i) {
        const int r = E::row(i);
        const Score scale = s.scale[r], bias = s.bias[r];
        const bool allowed = s.allowed[r];
#pragma unroll
        for (int j = 0; j < E::OWN_COLUMNS; ++j) {
          const int c = E::column(j) - half;
          if (c >= 0 && c < Tile::HALF) s.scores[c][r] = final_score(sum[i][j], scale, bias, allowed);
        }
      }
      __syncthreads();
      for (int c = warp; c < Tile::HALF; c += WARPS) {
        const int64_t prototype = first_prototype + half + c;
        if (prototype >= a.g.prototypes) break;
        for (int member = 0; member < a.grouped; ++member) {
          const int64_t sample = block.group * a.grouped + member;
          if (sample >= a.g.samples) break;
          const int64_t pair = sample * a.g.prototypes + prototype, at = a.lists.at(pair, block.split) + lane;
          const int start = a.grouped == 1 ? 0 : member * a.g.patches;
          const int stop = a.grouped == 1 ? E::ROWS : start + a.g.patches;
          const int first_patch = a.grouped == 1 ? static_cast<int>(tile * E::ROWS) : -start;
          const bool first_time = tile == begin;
          bool current = first_time;  // `mine` is the list
          Entry mine;
          Score least = -INFINITY;
          if constexpr (verify)
            least = static_cast<Score>(a.least[pair]);
          else if (!first_time)
            least = worst[half + c];
          for (int r0 = start; r0 < stop; r0 += LANES) {
            const int r = r0 + lane;
            Score score = r < stop ? s.scores[c][r] : Score(-INFINITY);
            bool good = score > least;
            if constexpr (verify) {
              good = false;
              if (r < stop && s.allowed[r]) {
                const Score error = score_error<Score>(a.g, a.metric, static_cast<Score>(a.bound), s.squared[r],
                                                       static_cast<Score>(a.length[prototype]));
                good = score + error >= least;
              }
            }
            unsigned left = __ballot_sync(ALL, good);
            if (left && !current) {
              if (kept) mine.key = a.lists.key[at], mine.place = a.lists.place[at];
              current = true;
            }
            while (left) {
              const int source = __ffs(static_cast<int>(left)) - 1;
              Entry added;
              added.place = first_patch + r0 + source;
              if constexpr (verify) {
                const T* patch = static_cast<const T*>(a.x) + s.offset[r0 + source];
                const T* proto = static_cast<const T*>(a.p) + prototype * a.g.depth;
                added.key = to_key(exact_distance(a.g, patch, proto, a.metric, lane));
                insert(mine, added, lane);
                left &= left - 1;
              } else {
                added.key = to_key(score_key(__shfl_sync(ALL, score, source)));
                insert(mine, added, lane);
                const Entry out = entry_of(mine, topk - 1);
                if (out.place != NOWHERE) least = static_cast<Score>(-from_key(out.key));
                left &= left - 1;
                left &= __ballot_sync(ALL, score > least);
              }
            }
          }
          if (current && kept) a.lists.key[at] = mine.key, a.lists.place[at] = mine.place;
          if constexpr (!verify) {
            __syncwarp();
            if (lane == 0) worst[half + c] = least;
            __syncwarp();
          }
        }
      }
      __syncthreads();
    }
  }
}

template <class T, class E>
const char* launch_screen(const Screen& a, void* stream) {
  const int64_t blocks = a.columns * a.splits * ceil_div(a.g.samples, a.grouped);
  if (a.least) return launch_kernel(screen_list_kernel<T, E, true>, blocks, THREADS, stream, a);
  if (a.lists.topk > 1 || a.grouped > 1)
    return launch_kernel(screen_list_kernel<T, E, false>, blocks, THREADS, stream, a);
  return launch_kernel(screen_best_kernel<T, E>, blocks, THREADS, stream, a);
}

}  // namespace
}  // namespace protofast
