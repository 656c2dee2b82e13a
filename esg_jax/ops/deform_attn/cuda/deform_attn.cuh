// Multi-scale deformable attention: forward and backward kernels.
//
// A group of G = D / Pack<T>::size lanes owns one (query, head); every lane owns 16 bytes of its channels. The samples
// of a group are located cooperatively: lane j does the address arithmetic of sample j once and the group reads it by
// shuffles, instead of every channel repeating it. The backward pass reduces the gradients of location and weight over
// the channels with shuffles, so only the gradient of the values needs atomics (16 bytes wide from sm_90 on).
#pragma once
#include <cstdint>

namespace esg {

constexpr int kMaxLevels = 8;
constexpr int kThreads = 256;
constexpr unsigned kFullWarp = 0xffffffffu;

struct Problem {
  int64_t units;  // batch * queries * heads
  int queries, heads, rows, samples, points, levels;
  int height[kMaxLevels], width[kMaxLevels], start[kMaxLevels];
};

// 16 bytes of channels as float32.
template <typename T>
struct Pack;

template <>
struct Pack<float> {
  static constexpr int size = 4;
  static __device__ void load(const float* from, float (&to)[size]) {
    const float4 raw = *reinterpret_cast<const float4*>(from);
    to[0] = raw.x, to[1] = raw.y, to[2] = raw.z, to[3] = raw.w;
  }
  static __device__ void store(float* to, const float (&from)[size]) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  }
};

// Where a sample reads: element offset of its upper left corner from the head's first row, distance to the next map
// row, which corners exist (bit 0 upper left, 1 upper right, 2 lower left, 3 lower right), and its fractions.
struct Sample {
  int offset, stride;
  unsigned corners;
  float x, y, weight;
};

// Rounds like the definition (no fused multiply-add): a sample must fall on the same side of a pixel centre.
__device__ inline Sample locate(const Problem& problem, int level, float x, float y, float weight, int row_elements) {
  const int height = problem.height[level], width = problem.width[level];
  const float pixel_x = __fadd_rn(__fmul_rn(x, static_cast<float>(width)), -0.5f);
  const float pixel_y = __fadd_rn(__fmul_rn(y, static_cast<float>(height)), -0.5f);
  const float low_x = floorf(pixel_x), low_y = floorf(pixel_y);
  // Clamped before the cast, so that huge offsets stay inside int32.
  const int column = static_cast<int>(fminf(fmaxf(low_x, -2.0f), width + 1.0f));
  const int row = static_cast<int>(fminf(fmaxf(low_y, -2.0f), height + 1.0f));
  const unsigned left = column >= 0 && column < width, right = column >= -1 && column < width - 1;
  const unsigned top = row >= 0 && row < height, bottom = row >= -1 && row < height - 1;
  Sample sample;
  sample.offset = (problem.start[level] + row * width + column) * row_elements;
  sample.stride = width * row_elements;
  sample.corners = (top & left) | (top & right) << 1 | (bottom & left) << 2 | (bottom & right) << 3;
  sample.x = pixel_x - low_x;
  sample.y = pixel_y - low_y;
  sample.weight = weight;
  return sample;
}

template <int G>
__device__ inline Sample broadcast(const Sample& mine, int lane) {
  Sample sample;
  sample.offset = __shfl_sync(kFullWarp, mine.offset, lane, G);
  sample.stride = __shfl_sync(kFullWarp, mine.stride, lane, G);
  sample.corners = __shfl_sync(kFullWarp, mine.corners, lane, G);
  sample.x = __shfl_sync(kFullWarp, mine.x, lane, G);
  sample.y = __shfl_sync(kFullWarp, mine.y, lane, G);
  sample.weight = __shfl_sync(kFullWarp, mine.weight, lane, G);
  return sample;
}

template <int G>
__device__ inline float sum_over_group(float value) {
#pragma unroll
  for (int distance = G / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance, G);
  return value;
}

// Which unit and lane a thread is. Threads past the end repeat the last unit and write nothing: shuffles need all lanes.
template <int G>
struct Place {
  int lane, head;
  int64_t unit, batch;
  bool writes;
  __device__ explicit Place(const Problem& problem) {
    lane = threadIdx.x % G;
    unit = static_cast<int64_t>(blockIdx.x) * (kThreads / G) + threadIdx.x / G;
    writes = unit < problem.units;
    if (!writes) unit = problem.units - 1;
    head = static_cast<int>(unit % problem.heads);
    batch = unit / problem.heads / problem.queries;
  }
};

// Samples [first, first + G) of a unit: lane j locates number first + j. Past the end: no corners.
template <int G>
__device__ inline Sample locate_own(const Problem& problem, const Place<G>& place, int first, const float* locations,
                                    const float* weights, int row_elements) {
  const int own = first + place.lane;
  if (own >= problem.samples) return Sample{0, 0, 0u, 0.0f, 0.0f, 0.0f};
  const int64_t index = place.unit * problem.samples + own;
  const float2 xy = reinterpret_cast<const float2*>(locations)[index];
  return locate(problem, own / problem.points, xy.x, xy.y, weights[index], row_elements);
}

template <typename T, int G>
__global__ void __launch_bounds__(kThreads)
    deform_attn_forward(const __grid_constant__ Problem problem, const T* __restrict__ values,
                        const float* __restrict__ locations, const float* __restrict__ weights, T* __restrict__ out) {
  constexpr int kPack = Pack<T>::size;
  constexpr int kChannels = kPack * G;
  const Place<G> place(problem);
  const int row_elements = problem.heads * kChannels;
  const int own_channels = place.head * kChannels + place.lane * kPack;
  const T* map = values + place.batch * problem.rows * row_elements + own_channels;
  float sum[kPack] = {};
  for (int first = 0; first < problem.samples; first += G) {
    const Sample mine = locate_own(problem, place, first, locations, weights, row_elements);
    const int count = min(G, problem.samples - first);
    for (int j = 0; j < count; ++j) {
      const Sample sample = broadcast<G>(mine, j);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        if (!(sample.corners >> corner & 1)) continue;
        const int right = corner & 1, bottom = corner >> 1;
        const float coefficient =
            (right ? sample.x : 1.0f - sample.x) * (bottom ? sample.y : 1.0f - sample.y) * sample.weight;
        float value[kPack];
        Pack<T>::load(map + sample.offset + right * row_elements + bottom * sample.stride, value);
#pragma unroll
        for (int c = 0; c < kPack; ++c) sum[c] += coefficient * value[c];
      }
    }
  }
  if (place.writes) Pack<T>::store(out + place.unit * kChannels + place.lane * kPack, sum);
}

__device__ inline void add_to_global(float* to, float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#else
  atomicAdd(to, a), atomicAdd(to + 1, b), atomicAdd(to + 2, c), atomicAdd(to + 3, d);
#endif
}

// grad_values must be zero on entry.
template <typename T, int G>
__global__ void __launch_bounds__(kThreads)
    deform_attn_backward(const __grid_constant__ Problem problem, const T* __restrict__ values,
                         const float* __restrict__ locations, const float* __restrict__ weights,
                         const T* __restrict__ grad_out, float* __restrict__ grad_values,
                         float* __restrict__ grad_locations, float* __restrict__ grad_weights) {
  constexpr int kPack = Pack<T>::size;
  constexpr int kChannels = kPack * G;
  const Place<G> place(problem);
  const int row_elements = problem.heads * kChannels;
  const int64_t map = place.batch * problem.rows * row_elements + place.head * kChannels + place.lane * kPack;
  float grad[kPack];
  Pack<T>::load(grad_out + place.unit * kChannels + place.lane * kPack, grad);
  for (int first = 0; first < problem.samples; first += G) {
    const Sample mine = locate_own(problem, place, first, locations, weights, row_elements);
    const int count = min(G, problem.samples - first);
    float own_weight = 0.0f, own_x = 0.0f, own_y = 0.0f;
    for (int j = 0; j < count; ++j) {
      const Sample sample = broadcast<G>(mine, j);
      // Gradients of this lane's channels with respect to weight, x and y (pixels, before the attention weight).
      float to_weight = 0.0f, to_x = 0.0f, to_y = 0.0f;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        if (!(sample.corners >> corner & 1)) continue;
        const int right = corner & 1, bottom = corner >> 1;
        const float tent_x = right ? sample.x : 1.0f - sample.x, tent_y = bottom ? sample.y : 1.0f - sample.y;
        const int64_t element = map + sample.offset + right * row_elements + bottom * sample.stride;
        float value[kPack];
        Pack<T>::load(values + element, value);
        float dot = 0.0f;
#pragma unroll
        for (int c = 0; c < kPack; ++c) dot += value[c] * grad[c];
        to_weight += tent_x * tent_y * dot;
        to_x += (right ? tent_y : -tent_y) * dot;
        to_y += (bottom ? tent_x : -tent_x) * dot;
        if (place.writes) {
          const float scale = tent_x * tent_y * sample.weight;
#pragma unroll
          for (int c = 0; c < kPack; c += 4) {
            add_to_global(grad_values + element + c, scale * grad[c], scale * grad[c + 1], scale * grad[c + 2],
                          scale * grad[c + 3]);
          }
        }
      }
      to_weight = sum_over_group<G>(to_weight);
      to_x = sum_over_group<G>(to_x);
      to_y = sum_over_group<G>(to_y);
      if (place.lane == j) own_weight = to_weight, own_x = to_x, own_y = to_y;
    }
    const int own = first + place.lane;
    if (place.writes && own < problem.samples) {
      const int level = own / problem.points;
      const int64_t index = place.unit * problem.samples + own;
      grad_weights[index] = own_weight;
      reinterpret_cast<float2*>(grad_locations)[index] = make_float2(own_x * mine.weight * problem.width[level],
                                                                     own_y * mine.weight * problem.height[level]);
    }
  }
}

}  // namespace esg
