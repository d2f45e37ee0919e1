// Farthest-first traversal in few dimensions: points lie in boxes, and a choice meets only the boxes near it.
#pragma once

#include <memory>

#include "selection_greedy.h"

namespace protofast {

template <class Real>
class BoxTraversal {
 public:
  BoxTraversal(Covering& covering, const BoxLoops<Real>& loops, int64_t choices)
      : covering_(covering),
        cloud_(covering.cloud()),
        loops_(loops),
        axes_(cloud_.dim + cloud_.cosine()),
        // Few boxes to look at for a choice, and few points in those that it changes.
        depth_(std::clamp(static_cast<int>(std::log2(8.0 * static_cast<double>(cloud_.count)) / 2 + 0.5), 3,
                          3 + static_cast<int>(std::log2(static_cast<double>(choices))))) {
    split();
    fill();
  }

  Key next(int64_t position) {
    const int64_t number = covering_.centers().count - 1;
    const int64_t own = box_of(position), slot = slot_of(own, position);
    if (value_[slot] > 0) label_[slot] = static_cast<int32_t>(number);
    value_[slot] = -1;
    const double* const center = covering_.centers().at(number);
    const int64_t count = loops_.near(boxes_, center, near_.data());
    const auto meet = [&](int64_t box) {
      boxes_.most[box] = loops_.meet(boxes_, coordinates_.get(), box, center, static_cast<int32_t>(number),
                                     value_.get(), label_.get());
    };
    parallel(count, std::max<int64_t>(32, (int64_t{1} << 14) * boxes_.count / boxes_.slots),
             [&](int64_t begin, int64_t end) {
               for (int64_t i = begin; i < end; ++i) meet(near_[i]);
             });
    meet(own);  // it may have held nothing farther than itself, and so not have been near
    return farthest();
  }

  // Gives the points their values and labels.
  void finish() {
    const Nearest& near = covering_.near();
    parallel(boxes_.slots, 1 << 15, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot)
        if (const int64_t position = position_[slot]; position >= 0)
          near.value[position] = value_[slot], near.label[position] = label_[slot];
    });
  }

 private:
  static constexpr int64_t BLOCK = 512;
  struct Cut {
    int32_t axis;
    Real at;
  };

  // A tree that halves a sample of the points along its widest axis, and again; node i has children 2i and 2i + 1.
  void split() {
    const int64_t leaves = int64_t{1} << depth_, n = cloud_.count, some = std::min(n, 4 * leaves);
    std::vector<Real> sample(some * axes_);
    for (int64_t i = 0; i < some; ++i) loops_.read(cloud_, n * i / some, n * i / some + 1, sample.data() + i * axes_);
    tree_.assign(leaves, {0, 0});
    std::vector<int32_t> order(some);
    std::iota(order.begin(), order.end(), 0);
    halve(sample, order.data(), order.data() + some, 1);
  }

  void halve(const std::vector<Real>& sample, int32_t* begin, int32_t* end, int64_t node) {
    if (node >= std::ssize(tree_) || begin == end) return;
    int widest = 0;
    Real width = -1;
    for (int axis = 0; axis < axes_; ++axis) {
      Real low = sample[*begin * axes_ + axis], high = low;
      for (const int32_t* i = begin; i < end; ++i) {
        const Real x = sample[*i * axes_ + axis];
        low = std::min(low, x), high = std::max(high, x);
      }
      if (high - low > width) width = high - low, widest = axis;
    }
    int32_t* const middle = begin + (end - begin) / 2;
    const auto at = [&](int32_t i) { return sample[i * axes_ + widest]; };
    std::nth_element(begin, middle, end, [&](int32_t a, int32_t b) { return at(a) < at(b); });
    tree_[node] = {widest, at(*middle)};
    halve(sample, begin, middle, 2 * node), halve(sample, middle, end, 2 * node + 1);
  }

  // Of points, (count, axes); level by level, so that one point need not wait for another.
  void boxes_of(const Real* x, int64_t count, int32_t* box) const {
    std::fill_n(box, count, 1);
    for (int level = 0; level < depth_; ++level)
      for (int64_t i = 0; i < count; ++i) {
        const Cut& cut = tree_[box[i]];
        box[i] = 2 * box[i] + (x[i * axes_ + cut.axis] >= cut.at);
      }
    for (int64_t i = 0; i < count; ++i) box[i] -= 1 << depth_;
  }

  int64_t box_of(int64_t position) const {
    Real x[MOST_AXES];
    int32_t box;
    loops_.read(cloud_, position, position + 1, x);
    boxes_of(x, 1, &box);
    return box;
  }

  int64_t slot_of(int64_t box, int64_t position) const {
    int64_t slot = boxes_.begin[box];
    while (position_[slot] != position) ++slot;
    return slot;
  }

  void fill() {
    const int64_t n = cloud_.count, leaves = int64_t{1} << depth_, parts = n < (1 << 14) ? 1 : thread_count();
    const auto own = std::make_unique_for_overwrite<int32_t[]>(n);
    std::vector<std::vector<int64_t>> to(parts, std::vector<int64_t>(leaves));
    const auto each_block = [&](int64_t part, const auto& use) {
      Real block[BLOCK * MOST_AXES];
      for (int64_t begin = n * part / parts, last = n * (part + 1) / parts; begin < last; begin += BLOCK) {
        const int64_t end = std::min(last, begin + BLOCK);
        loops_.read(cloud_, begin, end, block);
        use(begin, end, block);
      }
    };
    const auto each_part = [&](const auto& run) {
      parallel(parts, 1, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin) run(begin);
      });
    };
    each_part([&](int64_t part) {
      each_block(part, [&](int64_t begin, int64_t end, const Real* x) {
        boxes_of(x, end - begin, own.get() + begin);
        for (; begin < end; ++begin) ++to[part][own[begin]];
      });
    });
    boxes_.count = leaves;
    boxes_.begin.resize(leaves + 1);
    int64_t slot = 0;
    for (int64_t box = 0; box < leaves; ++box) {
      boxes_.begin[box] = slot;
      for (int64_t part = 0; part < parts; ++part) slot += std::exchange(to[part][box], slot);
      slot = (slot + 7) / 8 * 8;
    }
    boxes_.begin[leaves] = boxes_.slots = slot;
    coordinates_ = std::make_unique_for_overwrite<Real[]>(slot * axes_);
    value_ = std::make_unique_for_overwrite<double[]>(slot);
    label_ = std::make_unique_for_overwrite<int32_t[]>(slot);
    position_ = std::make_unique_for_overwrite<int64_t[]>(slot);
    each_part([&](int64_t part) {
      each_block(part, [&](int64_t begin, int64_t end, const Real* x) {
        for (; begin < end; ++begin, x += axes_) {
          const int64_t at = to[part][own[begin]]++;
          for (int64_t axis = 0; axis < axes_; ++axis) coordinates_[axis * slot + at] = x[axis];
          position_[at] = begin;
        }
      });
    });
    constexpr double infinity = std::numeric_limits<double>::infinity();
    for (int64_t axis = 0; axis < axes_; ++axis) boxes_.low[axis].resize(leaves), boxes_.high[axis].resize(leaves);
    boxes_.most.resize(leaves);
    near_.resize(leaves + 16);
    parallel(leaves, 256, [&](int64_t begin, int64_t end) {
      for (int64_t box = begin; box < end; ++box) {
        const int64_t first = boxes_.begin[box], last = to[parts - 1][box], room = boxes_.begin[box + 1];
        boxes_.most[box] = last > first ? infinity : -1;
        std::fill(value_.get() + first, value_.get() + last, infinity);
        std::fill(value_.get() + last, value_.get() + room, -1.0);
        std::fill(position_.get() + last, position_.get() + room, -1);
        std::fill(label_.get() + first, label_.get() + room, 0);
        for (int64_t axis = 0; axis < axes_; ++axis) {
          Real* const x = coordinates_.get() + axis * slot;
          std::fill(x + last, x + room, Real{0});
          const auto [low, high] = std::minmax_element(x + first, x + last);
          boxes_.low[axis][box] = last > first ? *low : infinity;
          boxes_.high[axis][box] = last > first ? *high : -infinity;
        }
      }
    });
  }

  // Slots of a box hold positions in ascending order.
  Key farthest() {
    const int64_t count = loops_.farthest(boxes_, near_.data());
    Key best{boxes_.most[near_[0]]};
    for (int64_t i = 0; i < count; ++i)
      for (int64_t slot = boxes_.begin[near_[i]]; slot < boxes_.begin[near_[i] + 1]; ++slot)
        if (value_[slot] == best.value && position_[slot] >= 0) {
          best.position = std::min(best.position, position_[slot]);
          break;
        }
    return best;
  }

  Covering& covering_;
  const Cloud& cloud_;
  const BoxLoops<Real> loops_;
  const int64_t axes_;
  const int depth_;
  std::vector<Cut> tree_;
  Boxes boxes_;
  std::vector<int32_t> near_;
  std::unique_ptr<Real[]> coordinates_;  // (axes, slots)
  std::unique_ptr<double[]> value_;
  std::unique_ptr<int32_t[]> label_;
  std::unique_ptr<int64_t[]> position_;
};

}  // namespace protofast
