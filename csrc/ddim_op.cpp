#include "ddim_op.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace protofast {
namespace {

// Plain numbers: Tensor::scalar_type() asks torch for each dtype in turn, which shows in the time of a small step.
int32_t dtype_number(const Tensor& tensor) {
  int32_t number;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &number));
  return number;
}

int32_t device_type(const Tensor& tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

Dtype dtype_of(const Tensor& sample) {
  const int32_t number = dtype_number(sample);
  if (number == aoti_torch_dtype_float32()) return Dtype::f32;
  if (number == aoti_torch_dtype_float64()) return Dtype::f64;
  if (number == aoti_torch_dtype_bfloat16()) return Dtype::bf16;
  if (number == aoti_torch_dtype_float16()) return Dtype::f16;
  throw std::runtime_error("ddim_step: sample must be float32, float64, bfloat16 or float16");
}

Tensor empty_strided(const Tensor& like, const int64_t* strides) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(like.dim(), like.sizes().data(), strides, dtype_number(like),
                                                  device_type(like), like.get_device_index(), &made));
  return Tensor(made);
}

// Do axes first, first + 1, … cover a block of memory without holes or overlap?
bool is_dense(const Tensor& tensor, size_t first) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  size_t left = 0;
  for (size_t axis = first; axis < sizes.size(); ++axis) left += sizes[axis] != 1;
  for (; left > 0; --left) {
    size_t axis = first;
    while (axis < sizes.size() && (sizes[axis] == 1 || strides[axis] != expected)) ++axis;
    if (axis == sizes.size()) return false;
    expected *= sizes[axis];
  }
  return true;
}

bool same_strides(const Tensor& a, const Tensor& b, size_t first) {
  const auto sizes = a.sizes(), left = a.strides(), right = b.strides();
  for (size_t axis = first; axis < sizes.size(); ++axis)
    if (sizes[axis] != 1 && left[axis] != right[axis]) return false;
  return true;
}

// How the kernel walks the tensors: `batch` blocks of `inner` elements, in the memory order of `sample`.
// Axes from `first` on lie within a block. An operand laid out in another way is copied.
class Layout {
 public:
  Layout(const Tensor& sample, bool one_timestep) : sample_(sample) {
    if (one_timestep && is_dense(sample_, 0)) {
      first_ = 0;
    } else {
      if (!is_dense(sample_, 1)) sample_ = torch::stable::contiguous(sample_);
      first_ = sample_.dim() > 0 ? 1 : 0;
    }
    batch_ = first_ ? sample_.size(0) : 1;
    inner_ = sample_.numel() / batch_;
  }

  const Tensor& sample() const { return sample_; }
  int64_t batch() const { return batch_; }
  int64_t inner() const { return inner_; }

  bool fits(const Tensor& tensor) const { return same_strides(sample_, tensor, first_); }

  Tensor make() const {
    const auto strides = sample_.strides();
    std::vector<int64_t> tight(strides.begin(), strides.end());
    if (first_) tight[0] = inner_;
    return empty_strided(sample_, tight.data());
  }

  Tensor fit(const Tensor& tensor) const {
    if (fits(tensor)) return tensor;
    Tensor copy = make();
    torch::stable::copy_(copy, tensor);
    return copy;
  }

  Operand operand(const Tensor& tensor) const { return {tensor.data_ptr(), batch_ > 1 ? tensor.stride(0) : inner_}; }

 private:
  Tensor sample_;
  size_t first_;
  int64_t batch_, inner_;
};

// Do an output and an input share memory in any other way than element by element?
bool overlaps(const Operand& out, const Operand& in, const Layout& layout, size_t element) {
  if (in.data == nullptr || (in.data == out.data && in.stride == out.stride)) return false;
  const auto end = [&](const Operand& o) {
    return static_cast<char*>(o.data) + ((layout.batch() - 1) * o.stride + layout.inner()) * element;
  };
  return static_cast<char*>(out.data) < end(in) && static_cast<char*>(in.data) < end(out);
}

void check_device(const char* name, const Tensor& tensor, const Tensor& sample) {
  STD_TORCH_CHECK(device_type(tensor) == device_type(sample) && tensor.get_device_index() == sample.get_device_index(),
                  name, " must be on the sample's device");
}

void check_like(const char* name, const Tensor& tensor, const Tensor& sample) {
  const auto sizes = tensor.sizes(), wanted = sample.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end()) &&
                      dtype_number(tensor) == dtype_number(sample),
                  name, " must have the sample's shape and dtype");
  check_device(name, tensor, sample);
}

void check_steps(const char* name, const Tensor& steps, const Tensor& sample, int32_t dtype) {
  STD_TORCH_CHECK(dtype_number(steps) == dtype, name, " has the wrong dtype");
  check_device(name, steps, sample);
}

int64_t step_stride(const char* name, const Tensor& steps, const Tensor& sample) {
  if (steps.numel() == 1) return 0;
  STD_TORCH_CHECK(steps.dim() == 1 && sample.dim() > 0 && steps.numel() == sample.size(0), name,
                  " must have one element, or one a sample");
  return steps.stride(0);
}

}  // namespace

void run_ddim_step_out(Launch launch, const DdimInputs& in, const Tensor& prev, const std::optional<Tensor>& x0) {
  const Tensor& sample = in.sample;
  DdimArgs args;
  args.dtype = dtype_of(sample);
  check_like("model_output", in.output, sample);
  if (in.cond) check_like("cond_output", *in.cond, sample);
  if (in.noise) check_like("noise", *in.noise, sample);
  check_like("prev_sample", prev, sample);
  if (x0) check_like("pred_original_sample", *x0, sample);
  check_steps("alphas_cumprod", in.alphas, sample, aoti_torch_dtype_float64());
  check_steps("timestep", in.timestep, sample, aoti_torch_dtype_int64());
  check_steps("prev_timestep", in.prev_timestep, sample, aoti_torch_dtype_int64());
  args.timestep_stride = step_stride("timestep", in.timestep, sample);
  args.prev_timestep_stride = step_stride("prev_timestep", in.prev_timestep, sample);
  if (sample.numel() == 0) return;

  const Layout layout(sample, in.timestep.numel() == 1 && in.prev_timestep.numel() == 1);
  const Tensor output = layout.fit(in.output);
  const auto cond = in.cond ? std::optional(layout.fit(*in.cond)) : std::nullopt;
  const auto noise = in.noise ? std::optional(layout.fit(*in.noise)) : std::nullopt;
  const Tensor alphas = in.alphas.is_contiguous() ? in.alphas : torch::stable::contiguous(in.alphas);
  args.sample = layout.operand(layout.sample());
  args.output = layout.operand(output);
  if (cond) args.cond = layout.operand(*cond);
  if (noise) args.noise = layout.operand(*noise);

  // An output that the kernel cannot write in place goes through a temporary.
  const size_t element = sample.element_size();
  const auto target = [&](const Tensor& out) {
    if (layout.fits(out)) {
      const Operand direct = layout.operand(out);
      bool clash = false;
      for (const Operand& input : {args.sample, args.output, args.cond, args.noise})
        clash |= overlaps(direct, input, layout, element);
      if (!clash) return out;
    }
    return layout.make();
  };
  Tensor to_prev = target(prev);
  auto to_x0 = x0 ? std::optional(target(*x0)) : std::nullopt;
  args.prev = layout.operand(to_prev);
  if (to_x0) args.x0 = layout.operand(*to_x0);

  args.batch = layout.batch();
  args.inner = layout.inner();
  args.alphas = static_cast<const double*>(alphas.data_ptr());
  args.rows = alphas.numel();
  args.timestep = static_cast<const int64_t*>(in.timestep.data_ptr());
  args.prev_timestep = static_cast<const int64_t*>(in.prev_timestep.data_ptr());
  args.eta = in.eta;
  args.low = in.low;
  args.high = in.high;
  args.guidance = in.guidance;
  args.prediction = in.prediction;
  args.clips = std::isfinite(in.low) || std::isfinite(in.high);
  args.device = sample.get_device_index();
  launch(args);

  const auto deliver = [](const Tensor& made, const Tensor& wanted) {
    if (made.get() == wanted.get()) return;
    Tensor out = wanted;
    torch::stable::copy_(out, made);
  };
  deliver(to_prev, prev);
  if (x0) deliver(*to_x0, *x0);
}

std::tuple<Tensor, Tensor> run_ddim_step(Launch launch, const DdimInputs& inputs) {
  const Tensor& sample = inputs.sample;
  const auto like_sample = [&] {
    // torch.empty_like keeps the strides of a dense tensor; this way is the quicker one.
    return sample.numel() && is_dense(sample, 0) ? empty_strided(sample, sample.strides().data())
                                                 : torch::stable::empty_like(sample);
  };
  std::tuple<Tensor, Tensor> result(like_sample(), like_sample());
  run_ddim_step_out(launch, inputs, std::get<0>(result), std::get<1>(result));
  return result;
}

}  // namespace protofast
