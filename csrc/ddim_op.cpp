#include "ddim_op.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace protofast {
namespace {

// Are the elements of each sample in row-major order?
bool is_row_major(const View& tensor) {
  int64_t expected = 1;
  for (int64_t axis = tensor.dim - 1; axis > 0; expected *= tensor.sizes[axis--])
    if (tensor.sizes[axis] != 1 && tensor.strides[axis] != expected) return false;
  return true;
}

// How the kernel walks the tensors: `batch` blocks of `inner` elements, in the memory order of the sample.
// Axes from `first` on lie within a block. An operand laid out in another way is copied.
struct Layout {
  Layout(const View& sample, bool one_block) : sample(sample) {
    first = one_block && is_dense(sample, 0) ? 0 : 1;
    batch = first ? sample.sizes[0] : 1;
    inner = sample.numel / batch;
  }

  bool fits(const View& tensor) const {
    for (int64_t axis = first; axis < sample.dim; ++axis)
      if (sample.sizes[axis] != 1 && sample.strides[axis] != tensor.strides[axis]) return false;
    return true;
  }

  // Uninitialised, with the dtype of `like`, laid out for the walk.
  Tensor make(const View& like) const {
    std::vector<int64_t> tight(sample.strides, sample.strides + sample.dim);
    if (first) tight[0] = inner;
    return empty(like, sample.dim, sample.sizes, tight.data());
  }

  Tensor copy(const View& tensor) const {
    Tensor made = make(tensor);
    torch::stable::copy_(made, *tensor.tensor);
    return made;
  }

  Operand operand(const View& tensor) const { return {tensor.data(), batch > 1 ? tensor.strides[0] : inner}; }

  const View& sample;
  int64_t first, batch, inner;
};

// Do an output and an input share memory in any other way than element by element?
bool overlaps(const Operand& out, size_t out_bytes, const Operand& in, size_t in_bytes, const Layout& layout) {
  if (in.data == nullptr || (in.data == out.data && in.stride == out.stride && in_bytes == out_bytes)) return false;
  const auto end = [&](const Operand& o, size_t element) {
    return static_cast<char*>(o.data) + ((layout.batch - 1) * o.stride + layout.inner) * element;
  };
  return static_cast<char*>(out.data) < end(in, in_bytes) && static_cast<char*>(in.data) < end(out, out_bytes);
}

void check_vector(const char* name, const View& vector, const View& sample, int32_t dtype) {
  STD_TORCH_CHECK(vector.dtype == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(vector.device_type == sample.device_type && vector.device == sample.device, name,
                  " must be on the sample's device");
}

void check_like(const char* name, const View& tensor, const View& sample, int32_t dtype) {
  STD_TORCH_CHECK(tensor.dim == sample.dim && std::equal(sample.sizes, sample.sizes + sample.dim, tensor.sizes) &&
                      tensor.dtype == dtype,
                  name, " must have the sample's shape and dtype");
  check_vector(name, tensor, sample, dtype);
}

void check_like(const char* name, const MaybeView& tensor, const View& sample, int32_t dtype) {
  if (tensor) check_like(name, *tensor, sample, dtype);
}

// The stride of a vector that has one element for all, or one for each of `count`.
int64_t stride_of(const char* name, const View& vector, int64_t count) {
  if (vector.numel == 1) return 0;
  STD_TORCH_CHECK(vector.dim == 1 && vector.numel == count, name, " must have one element, or one a sample");
  return vector.strides[0];
}

void check_seed(const View& seed, const View& sample) {
  check_vector("seed", seed, sample, numbers().int64);
  STD_TORCH_CHECK(seed.dim == 1 && seed.numel == 2 && seed.strides[0] == 1, "seed must be a contiguous (2,)");
}

void run(const Kernels& kernels, const DdimInputs& in, View sample, const View& prev, const MaybeView& x0) {
  STD_TORCH_CHECK(sample.dim > 0, "sample must have an axis of samples");
  const int64_t samples = sample.sizes[0];
  const View output(*in.output), table(*in.table);
  const MaybeView cond = view(in.cond), noise = view(in.noise), known = view(in.known),
                  known_noise = view(in.known_noise), mask = view(in.mask);

  DdimArgs args{};
  args.dtype = args.output_dtype = dtype_of(sample);
  if (args.dtype == Dtype::f32 && output.dtype != sample.dtype) {
    args.output_dtype = dtype_of(output);
    STD_TORCH_CHECK(args.output_dtype != Dtype::f64, "model_output must have the sample's dtype, or a narrower one");
  }
  check_like("model_output", output, sample, args.output_dtype == args.dtype ? sample.dtype : output.dtype);
  check_like("cond_output", cond, sample, output.dtype);
  check_like("noise", noise, sample, sample.dtype);
  check_like("known", known, sample, sample.dtype);
  check_like("known_noise", known_noise, sample, sample.dtype);
  check_like("mask", mask, sample, numbers().boolean);
  STD_TORCH_CHECK(known.has_value() == mask.has_value(), "known and mask go together");
  check_like("prev_sample", prev, sample, sample.dtype);
  check_like("pred_original_sample", x0, sample, sample.dtype);
  check_vector("table", table, sample, numbers().f64);
  STD_TORCH_CHECK(table.dim == 2 && table.sizes[1] == COLUMNS && is_row_major(table) && table.strides[0] == COLUMNS,
                  "table must be a contiguous (rows, 6)");
  args.rows = table.sizes[0];
  bool shared = args.rows == 1;
  if (const MaybeView row = view(in.row)) {
    check_vector("row", *row, sample, numbers().int64);
    args.row_stride = stride_of("row", *row, samples);
    args.row = static_cast<const int64_t*>(row->data());
    shared = row->numel == 1;
  } else {
    STD_TORCH_CHECK(shared || args.rows == samples, "table must have one row, or one a sample");
  }
  const auto per_sample = [&](const char* name, const MaybeTensor& tensor, const double*& data, int64_t& stride) {
    const MaybeView vector = view(tensor);
    if (!vector) return;
    check_vector(name, *vector, sample, numbers().f64);
    stride = stride_of(name, *vector, samples);
    data = static_cast<const double*>(vector->data());
    shared = false;
  };
  per_sample("rescale", in.rescale, args.rescale, args.rescale_stride);
  per_sample("threshold", in.threshold, args.threshold, args.threshold_stride);
  if (in.seed) check_seed(View(*in.seed), sample), shared = false;
  if (sample.numel == 0) return;

  // Copies live until the kernel has been queued.
  std::optional<Tensor> packed;
  if (!is_dense(sample, 1)) {
    packed = torch::stable::contiguous(*in.sample);
    sample = View(*packed);
  }
  const Layout layout(sample, shared);
  MaybeTensor copies[6];
  int used = 0;
  const auto place = [&](const View& tensor, Operand& operand) {
    if (layout.fits(tensor)) {
      operand = layout.operand(tensor);
    } else {
      copies[used] = layout.copy(tensor);
      operand = layout.operand(View(*copies[used++]));
    }
  };
  args.sample = layout.operand(sample);
  place(output, args.output);
  if (cond) place(*cond, args.cond);
  if (known) place(*known, args.known);
  if (known_noise) place(*known_noise, args.known_noise);
  if (mask) place(*mask, args.mask);
  MaybeTensor drawn;
  if (noise) {
    place(*noise, args.noise);
  } else if (in.seed && is_row_major(sample)) {
    args.seed = static_cast<const int64_t*>(in.seed->data_ptr());
  } else if (in.seed) {  // numbers follow the row-major order
    drawn = run_philox_normal(kernels, *sample.tensor, *in.seed);
    place(View(*drawn), args.noise);
  }

  // An output that the kernel cannot write in place goes through a temporary.
  const size_t element = bytes(args.dtype), output_element = bytes(args.output_dtype);
  const auto target = [&](const View& out, MaybeTensor& made, Operand& operand) {
    if (layout.fits(out)) {
      operand = layout.operand(out);
      bool clash = false;
      for (const Operand* input : {&args.sample, &args.noise, &args.known, &args.known_noise})
        clash |= overlaps(operand, element, *input, element, layout);
      for (const Operand* input : {&args.output, &args.cond})
        clash |= overlaps(operand, element, *input, output_element, layout);
      if (!(clash | overlaps(operand, element, args.mask, 1, layout))) return;
    }
    made = layout.make(out);
    operand = layout.operand(View(*made));
  };
  MaybeTensor made_prev, made_x0;
  target(prev, made_prev, args.prev);
  if (x0) target(*x0, made_x0, args.x0);

  args.batch = layout.batch;
  args.inner = layout.inner;
  args.table = static_cast<const double*>(table.data());
  args.low = in.low.value_or(-INFINITY);
  args.high = in.high.value_or(INFINITY);
  args.guidance = in.guidance;
  args.prediction = in.prediction;
  args.clips = in.low || in.high || in.threshold;
  args.clipped_direction = in.clipped_direction;
  args.bitwise = in.bitwise;
  args.device = sample.device;
  kernels.step(args);

  const auto deliver = [](const MaybeTensor& made, const Tensor& wanted) {
    if (!made) return;
    Tensor out = wanted;
    torch::stable::copy_(out, *made);
  };
  deliver(made_prev, *prev.tensor);
  if (x0) deliver(made_x0, *x0->tensor);
}

}  // namespace

void run_ddim_step_out(const Kernels& kernels, const DdimInputs& in, const Tensor& prev, const MaybeTensor& x0) {
  run(kernels, in, View(*in.sample), View(prev), view(x0));
}

std::tuple<Tensor, Tensor> run_ddim_step(const Kernels& kernels, const DdimInputs& in) {
  const View sample(*in.sample);
  if (sample.numel == 0 || !is_dense(sample, 0)) {  // torch.empty_like does not keep such strides
    std::tuple<Tensor, Tensor> made(torch::stable::empty_like(*in.sample), torch::stable::empty_like(*in.sample));
    run(kernels, in, sample, View(std::get<0>(made)), View(std::get<1>(made)));
    return made;
  }
  const auto like_sample = [&] { return empty(sample, sample.dim, sample.sizes, sample.strides); };
  std::tuple<Tensor, Tensor> made(like_sample(), like_sample());
  View prev = sample, x0 = sample;
  prev.tensor = &std::get<0>(made), x0.tensor = &std::get<1>(made);
  run(kernels, in, sample, prev, x0);
  return made;
}

Tensor run_ddim_coefficients(const Kernels& kernels, const Tensor& alphas_tensor, const Tensor& timestep_tensor,
                             const Tensor& prev_tensor, double eta) {
  const View alphas(alphas_tensor), timestep(timestep_tensor), prev(prev_tensor);
  check_vector("alphas_cumprod", alphas, alphas, numbers().f64);
  STD_TORCH_CHECK(alphas.dim == 1 && alphas.strides[0] == 1, "alphas_cumprod must be a contiguous vector");
  check_vector("timestep", timestep, alphas, numbers().int64);
  check_vector("prev_timestep", prev, alphas, numbers().int64);
  CoefficientArgs args{};
  args.count = timestep.numel == 1 ? prev.numel : timestep.numel;
  args.timestep_stride = stride_of("timestep", timestep, args.count);
  args.prev_timestep_stride = stride_of("prev_timestep", prev, args.count);
  const int64_t sizes[] = {args.count, COLUMNS}, strides[] = {COLUMNS, 1};
  const Tensor out = empty(alphas, 2, sizes, strides);
  args.alphas = static_cast<const double*>(alphas.data());
  args.rows = alphas.numel;
  args.timestep = static_cast<const int64_t*>(timestep.data());
  args.prev_timestep = static_cast<const int64_t*>(prev.data());
  args.eta = eta;
  args.out = static_cast<double*>(out.data_ptr());
  args.device = alphas.device;
  if (args.count > 0) kernels.coefficients(args);
  return out;
}

Tensor run_philox_normal(const Kernels& kernels, const Tensor& like, const Tensor& seed) {
  const View shape(like);
  check_seed(View(seed), shape);
  STD_TORCH_CHECK(shape.dim > 0, "like must have an axis of samples");
  Tensor out = torch::stable::empty_like(like);
  if (shape.numel == 0) return out;
  const Tensor flat = torch::stable::contiguous(out);
  kernels.normal({flat.data_ptr(), shape.sizes[0], shape.numel / shape.sizes[0],
                  static_cast<const int64_t*>(seed.data_ptr()), dtype_of(shape), shape.device});
  if (flat.data_ptr() != out.data_ptr()) torch::stable::copy_(out, flat);
  return out;
}

}  // namespace protofast
