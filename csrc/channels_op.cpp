#include "channels_op.h"

#include <algorithm>
#include <vector>

#include "temporaries.h"

namespace protofast::op {
namespace {

void check_same(const char* name, const View& tensor, const View& features, int32_t dtype) {
  STD_TORCH_CHECK(tensor.dtype == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.device_type == features.device_type && tensor.device == features.device, name,
                  " must be on the features' device");
}

int32_t result_dtype(const View& features) { return features.dtype == numbers().f64 ? numbers().f64 : numbers().f32; }

// Without gaps, in the order of the axes.
Tensor packed_empty(const View& like, int64_t dim, const int64_t* sizes, int32_t dtype) {
  std::vector<int64_t> strides(dim, 1);
  for (int64_t axis = dim - 1; axis > 0; --axis) strides[axis - 1] = strides[axis] * std::max<int64_t>(1, sizes[axis]);
  return empty(like, dim, sizes, strides.data(), dtype);
}

Tensor nothing(const View& like) {
  const int64_t none = 0, stride = 1;
  return empty(like, 1, &none, &stride, like.dtype);
}

// Where the pixels of a map lie; `offsets` keeps them where they are not one run.
ChannelMap map_of(const View& view, std::vector<int64_t>& offsets) {
  ChannelMap map{view.data(), view.strides[0], view.strides[1], nullptr};
  int64_t run = 1;
  bool is_run = true;
  for (int64_t axis = view.dim - 1; axis >= 2; run *= view.sizes[axis--])
    is_run = is_run && (view.sizes[axis] == 1 || view.strides[axis] == run);
  if (is_run) return map;
  offsets.assign(1, 0);
  for (int64_t axis = 2; axis < view.dim; ++axis) {
    std::vector<int64_t> finer;
    finer.reserve(offsets.size() * view.sizes[axis]);
    for (const int64_t offset : offsets)
      for (int64_t i = 0; i < view.sizes[axis]; ++i) finer.push_back(offset + i * view.strides[axis]);
    offsets.swap(finer);
  }
  map.offset = offsets.data();
  return map;
}

void check_range(const char* name, const int64_t* values, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(0 <= values[i] && values[i] < end, name, " has ", values[i], "; give 0 to ", end - 1);
}

ChannelPairs pairs_of(const View& features, const View& rotation, const Tensor& channels_tensor, bool rectify,
                      std::vector<int64_t>& offsets, Temporaries& kept) {
  const View channels(channels_tensor);
  check_same("rotation", rotation, features, features.dtype);
  check_same("channels", channels, features, numbers().int64);
  STD_TORCH_CHECK(features.dim >= 3 && rotation.dim == 2 && rotation.sizes[1] == features.sizes[1],
                  "rotation must be (R, C) for features (B, C, *S)");
  STD_TORCH_CHECK((channels.dim == 1 || channels.dim == 2) && channels.sizes[0] == features.sizes[0],
                  "channels must be (B,) or (B, m)");
  ChannelPairs of{};
  of.samples = features.sizes[0], of.channels = features.sizes[1], of.rows = rotation.sizes[0];
  of.pixels = 1;
  for (int64_t axis = 2; axis < features.dim; ++axis) of.pixels *= features.sizes[axis];
  of.pairs = channels.dim == 2 ? channels.sizes[1] : 1;
  of.rotation = rotation.data(), of.row = rotation.strides[0], of.column = rotation.strides[1];
  of.rectify = rectify, of.dtype = dtype_of(features);
  if (channels.numel == 0) return of;
  STD_TORCH_CHECK(of.pixels > 0, "features must have a pixel");
  of.x = map_of(features, offsets);
  of.chosen = static_cast<const int64_t*>(kept.packed(channels_tensor).data_ptr());
  check_range("channels", of.chosen, channels.numel, of.rows);
  return of;
}

}  // namespace

std::tuple<Tensor, Tensor> channel_purity(const ChannelKernels& kernels, const Tensor& features_tensor,
                                          const Tensor& rotation_tensor, const Tensor& channels_tensor, bool rectify) {
  const View features(features_tensor), rotation(rotation_tensor), channels(channels_tensor);
  Temporaries kept(features);
  std::vector<int64_t> offsets;
  ChannelPurity args{};
  args.of = pairs_of(features, rotation, channels_tensor, rectify, offsets, kept);
  std::tuple<Tensor, Tensor> out(packed_empty(features, channels.dim, channels.sizes, result_dtype(features)),
                                 packed_empty(features, channels.dim, channels.sizes, numbers().int64));
  if (channels.numel == 0) return out;
  args.purity = std::get<0>(out).data_ptr(), args.index = static_cast<int64_t*>(std::get<1>(out).data_ptr());
  kernels.purity(args);
  return out;
}

std::tuple<Tensor, Tensor> channel_purity_backward(const ChannelKernels& kernels, const Tensor& grad,
                                                   const Tensor& features_tensor, const Tensor& rotation_tensor,
                                                   const Tensor& channels, const Tensor& purity, const Tensor& index,
                                                   bool rectify, bool to_features, bool to_rotation) {
  const View features(features_tensor), rotation(rotation_tensor);
  Temporaries kept(features);
  std::vector<int64_t> offsets, to_offsets;
  ChannelPurityGradient args{};
  args.of = pairs_of(features, rotation, channels, rectify, offsets, kept);
  const int64_t pairs = args.of.samples * args.of.pairs;
  const auto data = [&](const char* name, const Tensor& tensor, int32_t dtype) {
    const View seen(tensor);
    check_same(name, seen, features, dtype);
    STD_TORCH_CHECK(seen.numel == pairs, name, " must have one number a pair");
    return static_cast<const void*>(kept.packed(tensor).data_ptr());
  };
  std::tuple<Tensor, Tensor> out(
      to_features ? torch::stable::empty_like(features_tensor) : nothing(features),
      to_rotation ? packed_empty(features, 2, rotation.sizes, features.dtype) : nothing(features));
  if (to_features) torch::stable::zero_(std::get<0>(out));
  if (to_rotation) torch::stable::zero_(std::get<1>(out));
  if (pairs == 0) return out;
  args.grad = data("grad", grad, result_dtype(features));
  args.purity = data("purity", purity, result_dtype(features));
  args.index = static_cast<const int64_t*>(data("index", index, numbers().int64));
  check_range("index", args.index, pairs, args.of.pixels);
  if (to_features) args.to_x = map_of(View(std::get<0>(out)), to_offsets);
  args.to_rotation = to_rotation ? std::get<1>(out).data_ptr() : nullptr;
  kernels.gradient(args);
  return out;
}

}  // namespace protofast::op
