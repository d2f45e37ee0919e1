#include "prototype_screen.cuh"

namespace protofast {

const char* screen_simt(const Screen& screen, Dtype dtype, void* stream) {
  switch (dtype) {
    case Dtype::f32:
      return launch_screen<float, Simt<float, 8, 4>>(screen, stream);
    case Dtype::f64:
      return launch_screen<double, Simt<double, 4, 4>>(screen, stream);
    case Dtype::bf16:
      return launch_screen<__nv_bfloat16, Simt<float, 8, 4>>(screen, stream);
    case Dtype::f16:
      return launch_screen<__half, Simt<float, 8, 4>>(screen, stream);
  }
  return "unknown dtype";
}

}  // namespace protofast
