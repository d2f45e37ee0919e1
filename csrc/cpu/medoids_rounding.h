// Points in float32, as tiles take them.
#pragma once

#include <cmath>
#include <cstring>

#include "medoids_plan.h"
#include "threads.h"

namespace protofast {

class MemberRounding {
 public:
  // No point is farther from the mean than that.
  MemberRounding(const Panel& panel, const MedoidsLoops& loops, const double* mean, double farthest)
      : panel_(panel), loops_(loops), mean_(mean), scale_(std::ldexp(1, -std::ilogb(farthest) - 2)) {}

  double scale() const { return scale_; }
  // What rounding takes from a scaled point, so far from the mean.
  double missed(double length) const { return length * scale_ * 0x1.1p-24 + 1e-15; }
  int64_t depth() const { return (panel_.dim + loops_.lanes - 1) / loops_.lanes * loops_.lanes; }

  // Room for so many rows, of zeros.
  Block<float> rows(int64_t count) const {
    const int64_t room = (count + TILE_BLOCK - 1) / TILE_BLOCK * TILE_BLOCK * depth();
    Block<float> made(room);
    std::memset(made.get(), 0, room * sizeof(float));
    return made;
  }

  // Point i as row number `at`, or number `at` of the panels, of what is not null.
  void write(int64_t i, int64_t at, float* rows, float* panels) const {
    const int64_t width = loops_.lanes, height = loops_.rows, panel = loops_.panel, depth = this->depth();
    const double* const from = panel_.group(i / 8) + i % 8;
    float* const row = rows ? rows + at / height * height * depth + at % height * width : nullptr;
    float* const column = panels ? panels + at / panel * panel * depth + at % panel : nullptr;
    for (int64_t c = 0; c < panel_.dim; ++c) {
      const float x = static_cast<float>((from[c * 8] - mean_[c]) * scale_);
      if (rows) row[c / width * height * width + c % width] = x;
      if (panels) column[c * panel] = x;
    }
  }

  // All points, in the order given (or their own).
  RoundedMembers all(const int64_t* order, bool with_rows) const {
    RoundedMembers made{panel_.count,      panel_.dim, depth(), panel_.manhattan, rows(with_rows ? panel_.count : 0),
                        rows(panel_.count)};
    parallel(panel_.count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at)
        write(order ? order[at] : at, at, with_rows ? made.rows.get() : nullptr, made.panels.get());
    });
    return made;
  }

 private:
  const Panel& panel_;
  const MedoidsLoops& loops_;
  const double* const mean_;
  const double scale_;  // a power of two
};

}  // namespace protofast
