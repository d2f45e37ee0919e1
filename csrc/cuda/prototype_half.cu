#include "prototype_screen.cuh"

namespace protofast {

const char* screen_half(const Screen& screen, Dtype dtype, Arithmetic arithmetic, void* stream) {
  if (arithmetic == Arithmetic::F16) {
    if (dtype != Dtype::f16) return "half products are for half";
    return launch_screen<__half, Mma<Arithmetic::F16>>(screen, stream);
  }
  switch (dtype) {
    case Dtype::f32:
      return launch_screen<float, Mma<Arithmetic::BF16>>(screen, stream);
    case Dtype::bf16:
      return launch_screen<__nv_bfloat16, Mma<Arithmetic::BF16>>(screen, stream);
    case Dtype::f16:
      return launch_screen<__half, Mma<Arithmetic::BF16>>(screen, stream);
    case Dtype::f64:
      break;
  }
  return "float64 has no tensor-core search";
}

}  // namespace protofast
