#include "prototype_op.h"

#include <algorithm>
#include <numeric>

#include "temporaries.h"

namespace protofast::op {
namespace {

// The axes of features, and of a tensor of the same shape, with neighbours merged where both hold them in one run.
struct Layout {
  PrototypeShape shape{};
  FeatureMap x{}, other{};

  Layout(const View& features, const View& prototypes, const View* like, int64_t topk) {
    STD_TORCH_CHECK(features.dim >= 3 && (prototypes.dim == 2 || prototypes.dim == features.dim) &&
                        prototypes.sizes[1] == features.sizes[1],
                    "prototypes must be (P, D) or (P, D, *K) for features (B, D, *S)");
    shape.samples = features.sizes[0], shape.channels = features.sizes[1];
    shape.prototypes = prototypes.sizes[0], shape.topk = topk;
    std::fill_n(shape.size, AXES, 1), std::fill_n(shape.kernel, AXES, 1);
    x.sample = features.strides[0], x.channel = features.strides[1];
    if (like) other.sample = like->strides[0], other.channel = like->strides[1];
    int to = AXES;
    for (int64_t axis = features.dim - 1; axis >= 2; --axis) {
      const int64_t size = features.sizes[axis], kernel = prototypes.dim == 2 ? 1 : prototypes.sizes[axis];
      STD_TORCH_CHECK(kernel >= 1 && kernel <= size, "a window must fit into the features");
      if (size == 1) continue;
      const bool run = to < AXES && kernel == 1 && shape.kernel[to] == 1 &&
                       features.strides[axis] == shape.size[to] * x.stride[to] &&
                       (!like || like->strides[axis] == shape.size[to] * other.stride[to]);
      if (run) {
        shape.size[to] *= size;
        continue;
      }
      if (--to < 0) return;
      shape.size[to] = size, shape.kernel[to] = kernel;
      x.stride[to] = features.strides[axis];
      if (like) other.stride[to] = like->strides[axis];
    }
    fits = true;
  }

  bool fits = false;
};

// Features (and a tensor like them) with few enough axes, copied where they have too many; prototypes without gaps.
Layout layout_of(Temporaries& kept, const Tensor*& features, const Tensor*& prototypes, const Tensor** like,
                 int64_t topk) {
  prototypes = &kept.packed(*prototypes);
  const auto look = [&] {
    const View other(like ? **like : *features);
    return Layout(View(*features), View(*prototypes), like ? &other : nullptr, topk);
  };
  Layout found = look();
  if (!found.fits) {
    features = &kept.packed(*features);
    if (like) *like = &kept.packed(**like);
    found = look();
    STD_TORCH_CHECK(found.fits, "windows over more than ", AXES,
                    " axes have no native kernel; use backend='reference'");
  }
  found.x.data = features->data_ptr();
  if (like) found.other.data = (*like)->data_ptr();
  return found;
}

void check_same(const char* name, const View& tensor, const View& features, int32_t dtype) {
  STD_TORCH_CHECK(tensor.dtype == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.device_type == features.device_type && tensor.device == features.device, name,
                  " must be on the features' device");
}

int32_t result_dtype(const View& features) { return features.dtype == numbers().f64 ? numbers().f64 : numbers().f32; }

Tensor nothing(const View& like, int32_t dtype) {
  const int64_t none = 0, stride = 1;
  return empty(like, 1, &none, &stride, dtype);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> search(const PrototypeKernels& kernels, const Tensor& features_tensor,
                                          const Tensor& prototypes_tensor, const MaybeTensor& mask, int64_t metric,
                                          int64_t activation, double eps, int64_t topk, int64_t precision,
                                          bool verify) {
  const View features(features_tensor), prototypes(prototypes_tensor);
  check_same("prototypes", prototypes, features, features.dtype);
  STD_TORCH_CHECK(metric >= SQEUCLIDEAN && metric <= DOT && activation >= NONE && activation <= RECIPROCAL &&
                      precision >= AUTO && precision <= BF16 && topk >= 1,
                  "metric, activation, precision or topk is out of range");
  Temporaries kept(features);
  PrototypeSearch args{};
  const Tensor *x = &features_tensor, *p = &prototypes_tensor;
  const Layout layout = layout_of(kept, x, p, nullptr, topk);
  args.dtype = dtype_of(features);
  args.shape = layout.shape, args.x = layout.x, args.p = p->data_ptr();
  const int64_t samples = args.shape.samples, count = args.shape.prototypes;
  const int64_t sizes[] = {samples, count, topk}, strides[] = {count * topk, topk, 1};
  const int64_t dim = topk > 1 ? 3 : 2;
  const auto made = [&](int32_t dtype) { return empty(features, dim, sizes, strides, dtype); };
  const int32_t result = result_dtype(features);
  std::tuple<Tensor, Tensor, Tensor> out(activation == NONE ? nothing(features, result) : made(result), made(result),
                                         made(numbers().int64));
  if (samples * count == 0) return out;
  if (mask) {
    const View flags(*mask);
    check_same("mask", flags, features, numbers().boolean);
    STD_TORCH_CHECK(flags.numel == samples * args.shape.patches(), "mask must have one flag a patch");
    args.mask = static_cast<const bool*>(kept.packed(*mask).data_ptr());
  }
  args.metric = Metric(metric), args.activation = Activation(activation), args.eps = eps;
  args.precision = Precision(precision), args.verify = verify;
  args.activated = activation == NONE ? nullptr : std::get<0>(out).data_ptr();
  args.distance = std::get<1>(out).data_ptr();
  args.index = static_cast<int64_t*>(std::get<2>(out).data_ptr());
  args.device = features.device;
  args.scratch = kept.scratch();
  kernels.search(args);
  return out;
}

std::tuple<Tensor, Tensor> gradient(const PrototypeKernels& kernels, const MaybeTensor& grad_activation,
                                    const MaybeTensor& grad_distance, const Tensor& features_tensor,
                                    const Tensor& prototypes_tensor, const Tensor& distance, const Tensor& index,
                                    int64_t metric, int64_t activation, double eps, int64_t topk, bool to_features,
                                    bool to_prototypes) {
  const View features(features_tensor), prototypes(prototypes_tensor);
  check_same("prototypes", prototypes, features, features.dtype);
  const int32_t result = result_dtype(features);
  const int64_t winners = features.sizes[0] * prototypes.sizes[0] * topk;
  Temporaries kept(features);
  const auto data = [&](const char* name, const Tensor& tensor, int32_t dtype) {
    const View seen(tensor);
    check_same(name, seen, features, dtype);
    STD_TORCH_CHECK(seen.numel == winners, name, " must have one number a winner");
    return static_cast<const void*>(kept.packed(tensor).data_ptr());
  };
  std::tuple<Tensor, Tensor> out(
      to_features ? torch::stable::empty_like(features_tensor) : nothing(features, features.dtype),
      nothing(features, features.dtype));
  if (to_prototypes) {
    std::vector<int64_t> strides(prototypes.dim, 1);
    for (int64_t axis = prototypes.dim - 1; axis > 0; --axis)
      strides[axis - 1] = strides[axis] * std::max<int64_t>(1, prototypes.sizes[axis]);
    std::get<1>(out) = empty(features, prototypes.dim, prototypes.sizes, strides.data(), features.dtype);
  }
  if (features.numel == 0 || prototypes.numel == 0) {
    if (to_features && features.numel) torch::stable::zero_(std::get<0>(out));
    if (to_prototypes && prototypes.numel) torch::stable::zero_(std::get<1>(out));
    return out;
  }
  PrototypeGradient args{};
  const Tensor *x = &features_tensor, *p = &prototypes_tensor;
  const Tensor* to_x = &std::get<0>(out);
  const Layout layout = layout_of(kept, x, p, to_features ? &to_x : nullptr, topk);
  args.shape = layout.shape, args.x = layout.x, args.to_x = layout.other, args.p = p->data_ptr();
  args.grad_activation = grad_activation ? data("grad_activation", *grad_activation, result) : nullptr;
  args.grad_distance = grad_distance ? data("grad_distance", *grad_distance, result) : nullptr;
  args.distance = data("distance", distance, result);
  args.index = static_cast<const int64_t*>(data("index", index, numbers().int64));
  args.metric = Metric(metric), args.activation = Activation(activation), args.eps = eps;
  args.to_p = to_prototypes ? std::get<1>(out).data_ptr() : nullptr;
  args.dtype = dtype_of(features), args.device = features.device;
  args.scratch = kept.scratch();
  kernels.gradient(args);
  if (to_features && to_x != &std::get<0>(out)) torch::stable::copy_(std::get<0>(out), *to_x);
  return out;
}

Tensor map(const PrototypeKernels& kernels, const Tensor& features_tensor, const Tensor& prototypes_tensor,
           int64_t metric) {
  const View features(features_tensor), prototypes(prototypes_tensor);
  check_same("prototypes", prototypes, features, features.dtype);
  STD_TORCH_CHECK(prototypes.dim == 2 || prototypes.dim == features.dim, "prototypes must be (P, D) or (P, D, *K)");
  std::vector<int64_t> sizes(features.sizes, features.sizes + features.dim), strides(features.dim, 1);
  sizes[1] = prototypes.sizes[0];
  for (int64_t axis = features.dim - 1; axis > 0; --axis) {
    if (axis >= 2 && prototypes.dim > 2) sizes[axis] -= prototypes.sizes[axis] - 1;
    STD_TORCH_CHECK(axis < 2 || sizes[axis] >= 1, "a window must fit into the features");
    strides[axis - 1] = strides[axis] * std::max<int64_t>(1, sizes[axis]);
  }
  Tensor out = empty(features, features.dim, sizes.data(), strides.data(), result_dtype(features));
  if (std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>()) == 0) return out;
  Temporaries kept(features);
  PrototypeMap args{};
  const Tensor *x = &features_tensor, *p = &prototypes_tensor;
  const Layout layout = layout_of(kept, x, p, nullptr, 1);
  args.shape = layout.shape, args.x = layout.x, args.p = p->data_ptr();
  args.metric = Metric(metric), args.distance = out.data_ptr();
  args.dtype = dtype_of(features), args.device = features.device;
  args.scratch = kept.scratch();
  kernels.map(args);
  return out;
}

}  // namespace protofast::op
