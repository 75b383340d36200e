// The short causal convolution before linear attention: each channel by itself, over its last
// inputs.
#pragma once

#include "activation.h"
#include "kernels.h"
#include "rows.h"

namespace headwise {
namespace HEADWISE_ISA {

// The first `count` sums, finished; there is memory for whole vectors.
template <class T>
HEADWISE_INLINE void write_sums(const ConvolutionArgs& args, float* sums, int64_t count, T* out) {
  if (args.silu)
    for (int64_t i = 0; i < count; i += W) store(sums + i, activate(kSilu, load(sums + i)));
  for (int64_t i = 0; i < count; ++i) from_float(sums[i], out + i);
}

// The input before the first token, -1 the last of them.
template <class T>
HEADWISE_INLINE float input_before(const ConvolutionArgs& args, int64_t channel, int64_t index) {
  if (args.state == nullptr) return 0.0f;
  return to_float(static_cast<const T*>(args.state)[(channel + 1) * args.kept + index]);
}

// Channels side by side, token after token: the last inputs of all go round in `width` rows.
template <class T>
void by_channels(const ConvolutionArgs& args, int64_t b, int64_t first, int64_t count,
                 int64_t tokens, Scratch scratch) {
  const int64_t width = args.width, channels = args.channels;
  float* weights = scratch.take<float>(width * kChannels);
  float* inputs = scratch.take<float>(width * kChannels);
  float* sums = scratch.take<float>(kChannels);
  float* bias = scratch.take<float>(kChannels);
  for (int64_t i = 0; i < kChannels; ++i) {
    const bool is = i < count;
    bias[i] =
        is && args.bias != nullptr ? to_float(static_cast<const T*>(args.bias)[first + i]) : 0.0f;
    for (int64_t j = 0; j < width; ++j) {
      weights[j * kChannels + i] =
          is ? to_float(static_cast<const T*>(args.weight)[(first + i) * width + j]) : 0.0f;
      // the row of token t is t modulo width
      inputs[j * kChannels + i] =
          is && j > 0 ? input_before<T>(args, b * channels + first + i, j - width) : 0.0f;
    }
  }
  const T* x = static_cast<const T*>(args.x) + b * args.x_batch + first * args.x_channel;
  T* out = static_cast<T*>(args.out) + b * args.tokens * channels + first;
  int64_t row = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    float* now = inputs + row * kChannels;
    for (int64_t i = 0; i < count; ++i) now[i] = to_float(x[t * args.x_token + i]);
    if (++row == width) row = 0;  // the oldest
    for (int64_t i = 0; i < kChannels; i += W) {
      vf sum = load(bias + i);
      int64_t at = row;
      for (int64_t j = 0; j < width; ++j) {
        sum += load(weights + j * kChannels + i) * load(inputs + at * kChannels + i);
        if (++at == width) at = 0;
      }
      store(sums + i, sum);
    }
    write_sums(args, sums, count, out + t * channels);
  }
  for (int64_t t = tokens; t < args.tokens; ++t)
    for (int64_t i = 0; i < count; ++i) from_float(0.0f, out + t * channels + i);
}

// Tokens of a channel side by side.
template <class T>
void by_tokens(const ConvolutionArgs& args, int64_t b, int64_t channel, int64_t tokens,
               Scratch scratch) {
  const int64_t width = args.width, index = b * args.channels + channel;
  float* inputs = scratch.take<float>(width + kRun + W);
  float* sums = scratch.take<float>(kRun);
  float weights[kMostWidth];
  for (int64_t j = 0; j < width; ++j) {
    weights[j] = to_float(static_cast<const T*>(args.weight)[channel * width + j]);
    if (j > 0) inputs[j - 1] = input_before<T>(args, index, j - width);
  }
  const float bias =
      args.bias != nullptr ? to_float(static_cast<const T*>(args.bias)[channel]) : 0.0f;
  const T* x = static_cast<const T*>(args.x) + b * args.x_batch + channel * args.x_channel;
  T* out = static_cast<T*>(args.out) + index * args.tokens;
  for (int64_t t = 0; t < tokens; t += kRun) {
    const int64_t count = tokens - t < kRun ? tokens - t : kRun;
    for (int64_t i = 0; i < count; ++i) inputs[width - 1 + i] = to_float(x[(t + i) * args.x_token]);
    for (int64_t i = count; i < count + W; ++i) inputs[width - 1 + i] = 0.0f;
    for (int64_t i = 0; i < count; i += W) {
      vf sum = splat(bias);
      for (int64_t j = 0; j < width; ++j) sum += splat(weights[j]) * load(inputs + i + j);
      store(sums + i, sum);
    }
    write_sums(args, sums, count, out + t);
    for (int64_t j = 0; j + 1 < width; ++j) inputs[j] = inputs[count + j];
  }
  for (int64_t t = tokens; t < args.tokens; ++t) from_float(0.0f, out + t);
}

template <class T>
void convolution(const ConvolutionArgs& args, int64_t task, char* memory) {
  const int64_t blocks = args.blocks(), b = task / blocks, first = task % blocks * kChannels;
  const int64_t count = args.channels - first < kChannels ? args.channels - first : kChannels;
  const int64_t tokens = args.lengths != nullptr ? args.lengths[b] : args.tokens;
  if (args.channels_last())
    by_channels<T>(args, b, first, count, tokens, {memory});
  else
    for (int64_t i = 0; i < count; ++i) by_tokens<T>(args, b, first + i, tokens, {memory});
  if (args.after == nullptr) return;
  // forwards: `after` may be `state`, of which only what lies ahead is read
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t at = (b * args.channels + i) * args.kept;
    T* after = static_cast<T*>(args.after) + at;
    const T* x = static_cast<const T*>(args.x) + b * args.x_batch + i * args.x_channel;
    for (int64_t n = 0; n < args.kept; ++n) {
      const int64_t t = tokens - args.kept + n;
      if (t >= 0)
        after[n] = x[t * args.x_token];
      else if (args.state != nullptr)
        after[n] = static_cast<const T*>(args.state)[at + args.kept + t];
      else
        from_float(0.0f, after + n);
    }
  }
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
