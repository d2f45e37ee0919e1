// What the selection loops work on, whatever the instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../selection.h"

namespace protofast {

// The allowed points of one cloud. A position counts these alone.
struct Cloud {
  const void* data;
  int64_t row, column, count, dim;
  Measure measure;
  const int64_t* rows;  // of the positions; null where they are the same
  const double* norms;  // of the positions, for cosine

  int64_t at(int64_t position) const { return rows ? rows[position] : position; }
  bool cosine() const { return measure == Measure::cosine; }
  bool manhattan() const { return measure == Measure::manhattan; }
  // Coordinates in float64, with one for the direction of zero vectors, and zeros to a multiple of eight.
  int64_t width() const { return (dim + cosine() + 7) / 8 * 8; }
  // What obeys the triangle inequality.
  double length(double value) const { return manhattan() ? value : std::sqrt(value); }
};

// The value of the nearest center of each position, and which. Chosen points have a value of −1, below all others.
struct Nearest {
  double* value;
  int64_t* label;

  // Position `chosen` is the center `number` from now on.
  void leave(int64_t chosen, int64_t number) const {
    if (value[chosen] > 0) label[chosen] = number;
    value[chosen] = -1;
  }
};

// The order of choice: the larger value, the lower position among equals.
struct Key {
  double value = -std::numeric_limits<double>::infinity();
  int64_t position = std::numeric_limits<int64_t>::max();

  bool over(const Key& other) const {
    return value > other.value || (value == other.value && position < other.position);
  }
};

// Coordinates as the screens take them: x · scale + shift, rounded to float32 or, from there, to bytes.
struct Rounding {
  int64_t dim = 0;
  bool manhattan = false;
  double scale = 1;             // a power of two
  std::vector<double> shift;    // (width)
  std::vector<float> as_float;  // of the shift
  int64_t depth = 0;            // coordinates of a packed row
  bool bytes = false;           // whether the processor multiplies bytes
};

// A row in bytes: whole multiples of `step`.
struct ByteRow {
  float step, square, missed;  // square of its length; the length of what rounding took away
};

// Centers in the order chosen: in float64, and rounded.
struct Centers {
  Centers(int64_t most, int64_t width) : width(width) { coordinates.reserve(most * width); }

  int64_t width, count = 0;
  std::vector<double> coordinates;  // (count, width)
  std::vector<float> rows, missed;  // (count, depth); what rounding took away
  std::vector<uint8_t> bytes;       // (count, depth), 128 added
  std::vector<ByteRow> byte_rows;

  const double* at(int64_t number) const { return coordinates.data() + number * width; }
};

constexpr int MOST_AXES = 8;

// Near points in boxes. Box b has slots begin[b] to begin[b + 1], a multiple of eight, of which the last may be empty.
struct Boxes {
  int64_t count = 0, slots = 0;  // count is a multiple of eight
  std::vector<int64_t> begin;
  std::vector<double> low[MOST_AXES], high[MOST_AXES];
  std::vector<double> most;  // the largest value inside
};

template <class Real>
struct BoxLoops {
  void (*read)(const Cloud&, int64_t begin, int64_t end, Real* to);
  int64_t (*near)(const Boxes&, const double* center, int32_t* found);
  int64_t (*farthest)(const Boxes&, int32_t* found);
  double (*meet)(const Boxes&, const Real* coordinates, int64_t box, const double* center, int32_t number,
                 double* value, int32_t* label);
};

// Positions [begin, end) of a list (or those numbers themselves), and the centers that they have not met.
struct Meeting {
  const int32_t* centers;
  int64_t count;
  int64_t begin, end;
};

}  // namespace protofast
