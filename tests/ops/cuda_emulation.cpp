// Runs the CUDA kernels of deformable attention on the CPU: one thread per CUDA thread, shuffles through a barrier per
// warp. Checks arithmetic, shuffles and bounds (build with -fsanitize to check more); says nothing about speed.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(threads)

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct Index { unsigned x; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::min;

thread_local Index threadIdx, blockIdx;

struct Warp {
  std::barrier<> barrier{32};
  float slots[32];
};
thread_local Warp* warp;

template <typename T>
T exchange(T value, int source) {
  static_assert(sizeof(T) == 4);
  __builtin_memcpy(&warp->slots[threadIdx.x % 32], &value, 4);
  warp->barrier.arrive_and_wait();
  T result;
  __builtin_memcpy(&result, &warp->slots[source], 4);
  warp->barrier.arrive_and_wait();
  return result;
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane, int width) {
  return exchange(value, static_cast<int>(threadIdx.x % 32) / width * width + lane % width);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int) { return exchange(value, (threadIdx.x % 32) ^ mask); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline void atomicAdd(float* to, float value) { std::atomic_ref<float>(*to).fetch_add(value); }

#include "deform_attn.cuh"

template <typename Kernel>
void launch(int64_t blocks, Kernel kernel) {
  for (int64_t block = 0; block < blocks; ++block) {
    auto warps = std::make_unique<Warp[]>(esg::kThreads / 32);
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < esg::kThreads; ++i) {
      threads.emplace_back([&, i] {
        threadIdx.x = i, blockIdx.x = block, warp = &warps[i / 32];
        kernel();
      });
    }
    for (auto& thread : threads) thread.join();
  }
}

template <int G>
void run(const esg::Problem& p, const float* values, const float* locations, const float* weights, const float* grad_out,
         float* out, float* grad_values, float* grad_locations, float* grad_weights) {
  const int64_t blocks = (p.units + esg::kThreads / G - 1) / (esg::kThreads / G);
  launch(blocks, [&] { esg::deform_attn_forward<float, G>(p, values, locations, weights, out); });
  launch(blocks, [&] {
    esg::deform_attn_backward<float, G>(p, values, locations, weights, grad_out, grad_values, grad_locations,
                                        grad_weights);
  });
}

extern "C" void emulate(int batch, int queries, int heads, int channels, int levels, int points, const int* shapes,
                        const float* values, const float* locations, const float* weights, const float* grad_out,
                        float* out, float* grad_values, float* grad_locations, float* grad_weights) {
  esg::Problem p{};
  p.units = static_cast<int64_t>(batch) * queries * heads;
  p.queries = queries, p.heads = heads, p.points = points, p.levels = levels, p.samples = levels * points;
  for (int level = 0; level < levels; ++level) {
    p.height[level] = shapes[2 * level], p.width[level] = shapes[2 * level + 1];
    p.start[level] = p.rows;
    p.rows += p.height[level] * p.width[level];
  }
  const auto function = channels == 4 ? run<1> : channels == 8 ? run<2> : channels == 16 ? run<4> : run<8>;
  function(p, values, locations, weights, grad_out, out, grad_values, grad_locations, grad_weights);
}
