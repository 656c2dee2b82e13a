// XLA FFI handlers of the kernels in deform_attn.cuh. Built by `python -m esg_jax.ops.deform_attn.build_cuda`.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <string>
#include <type_traits>

#include "deform_attn.cuh"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace esg {

// The 16-bit types: eight channels, two per 32-bit word.
template <typename T, typename T2>
struct PackOfPairs {
  static constexpr int size = 8;
  static __device__ void load(const T* from, float (&to)[size]) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T2 pair;
      memcpy(&pair, &words[i], 4);
      to[2 * i] = static_cast<float>(pair.x);
      to[2 * i + 1] = static_cast<float>(pair.y);
    }
  }
  static __device__ void store(T* to, const float (&from)[size]) {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T2 pair;
      pair.x = static_cast<T>(from[2 * i]);
      pair.y = static_cast<T>(from[2 * i + 1]);
      memcpy(&words[i], &pair, 4);
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
};
template <>
struct Pack<__nv_bfloat16> : PackOfPairs<__nv_bfloat16, __nv_bfloat162> {};
template <>
struct Pack<__half> : PackOfPairs<__half, __half2> {};

// Leading dimensions of every array are batch: jax.vmap adds them.
ffi::ErrorOr<Problem> describe(ffi::AnyBuffer values, ffi::AnyBuffer locations, ffi::Span<const int64_t> shapes) {
  const auto v = values.dimensions(), l = locations.dimensions();
  if (v.size() < 4 || l.size() != v.size() + 2) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("deform_attn: values need 4 and locations 6 dimensions"));
  }
  Problem problem{};
  problem.rows = v[v.size() - 3];
  problem.heads = v[v.size() - 2];
  problem.queries = l[l.size() - 5];
  problem.levels = l[l.size() - 3];
  problem.points = l[l.size() - 2];
  problem.samples = problem.levels * problem.points;
  problem.units = locations.element_count() / (2 * problem.samples);
  if (problem.levels > kMaxLevels || static_cast<int64_t>(shapes.size()) != 2 * problem.levels) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("deform_attn: at most 8 levels, two sizes each"));
  }
  int start = 0;
  for (int level = 0; level < problem.levels; ++level) {
    problem.height[level] = shapes[2 * level];
    problem.width[level] = shapes[2 * level + 1];
    problem.start[level] = start;
    start += problem.height[level] * problem.width[level];
  }
  if (start != problem.rows) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("deform_attn: level sizes do not add up to the rows of values"));
  }
  return problem;
}

// Calls `launch(integral_constant<G>, blocks)` for the group size of these channels.
template <typename T, typename Launch>
ffi::Error with_group(int64_t channels, const Problem& problem, Launch launch) {
  const auto run = [&](auto group) {
    const int64_t per_block = kThreads / group.value;
    launch(group, static_cast<unsigned>((problem.units + per_block - 1) / per_block));
    const cudaError_t status = cudaGetLastError();
    return status == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(status));
  };
  switch (channels % Pack<T>::size ? 0 : channels / Pack<T>::size) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 4: return run(std::integral_constant<int, 4>());
    case 8: return run(std::integral_constant<int, 8>());
    case 16: return run(std::integral_constant<int, 16>());
    default: return ffi::Error::InvalidArgument("deform_attn: unsupported channels per head " + std::to_string(channels));
  }
}

template <typename Function>
ffi::Error with_type(ffi::DataType type, Function function) {
  switch (type) {
    case ffi::F32: return function(float());
    case ffi::BF16: return function(__nv_bfloat16());
    case ffi::F16: return function(__half());
    default: return ffi::Error::InvalidArgument("deform_attn: values must be float32, bfloat16 or float16");
  }
}

ffi::Error forward(cudaStream_t stream, ffi::AnyBuffer values, ffi::AnyBuffer locations, ffi::AnyBuffer weights,
                   ffi::Result<ffi::AnyBuffer> out, ffi::Span<const int64_t> shapes) {
  auto problem = describe(values, locations, shapes);
  if (problem.has_error()) return problem.error();
  return with_type(values.element_type(), [&](auto element) {
    using T = decltype(element);
    return with_group<T>(values.dimensions().back(), *problem, [&](auto group, unsigned blocks) {
      deform_attn_forward<T, group.value><<<blocks, kThreads, 0, stream>>>(
          *problem, static_cast<const T*>(values.untyped_data()), locations.typed_data<float>(),
          weights.typed_data<float>(), static_cast<T*>(out->untyped_data()));
    });
  });
}

ffi::Error backward(cudaStream_t stream, ffi::AnyBuffer values, ffi::AnyBuffer locations, ffi::AnyBuffer weights,
                    ffi::AnyBuffer grad_out, ffi::Result<ffi::AnyBuffer> grad_values,
                    ffi::Result<ffi::AnyBuffer> grad_locations, ffi::Result<ffi::AnyBuffer> grad_weights,
                    ffi::Span<const int64_t> shapes) {
  auto problem = describe(values, locations, shapes);
  if (problem.has_error()) return problem.error();
  const cudaError_t status = cudaMemsetAsync(grad_values->untyped_data(), 0, grad_values->size_bytes(), stream);
  if (status != cudaSuccess) return ffi::Error::Internal(cudaGetErrorString(status));
  return with_type(values.element_type(), [&](auto element) {
    using T = decltype(element);
    return with_group<T>(values.dimensions().back(), *problem, [&](auto group, unsigned blocks) {
      deform_attn_backward<T, group.value><<<blocks, kThreads, 0, stream>>>(
          *problem, static_cast<const T*>(values.untyped_data()), locations.typed_data<float>(),
          weights.typed_data<float>(), static_cast<const T*>(grad_out.untyped_data()),
          grad_values->typed_data<float>(), grad_locations->typed_data<float>(), grad_weights->typed_data<float>());
    });
  });
}

}  // namespace esg

XLA_FFI_DEFINE_HANDLER_SYMBOL(EsgDeformAttnForward, esg::forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("shapes"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(EsgDeformAttnBackward, esg::backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("shapes"),
                              {ffi::Traits::kCmdBufferCompatible});
