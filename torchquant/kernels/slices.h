// Elements of a dense tensor beside the numbers of their channels.
#pragma once

#include "common.h"

namespace tq {

// A dense tensor in the order of its memory: `outer` times, for each of `channels`, a slice of `inner` elements.
struct Layout {
    int64_t outer, channels, inner;

    int64_t numel() const { return outer * channels * inner; }
};

// Elements of one channel, or single ones of the channels from `channel` on: their numbers, given those of all channels.
struct OfOne {
    int64_t channel;
    template <typename T>
    Same<T> operator()(const T* numbers) const { return {numbers == nullptr ? T(0) : numbers[channel]}; }
};

struct OfEach {
    int64_t channel;
    template <typename T>
    Each<T> operator()(const T* numbers) const { return {numbers == nullptr ? nullptr : numbers + channel}; }
};

// Call `work(at, n, of)` for the elements first .. last in runs of at most BLOCK; of(numbers)[i] is the number at at + i.
template <typename Work>
static inline void in_runs(const Layout& layout, int64_t first, int64_t last, const Work& work) {
    const int64_t channels = layout.channels, inner = channels == 1 ? layout.numel() : layout.inner;
    int64_t channel = first / inner % channels, left = inner - first % inner;
    for (int64_t at = first, n; at < last; at += n) {
        n = last - at < BLOCK ? last - at : BLOCK;
        if (inner == 1 && channels > 1) {
            n = channels - channel < n ? channels - channel : n;
            work(at, n, OfEach{channel});
            channel = channel + n == channels ? 0 : channel + n;
            continue;
        }
        n = left < n ? left : n;
        work(at, n, OfOne{channel});
        left -= n;
        if (left == 0) {
            left = inner;
            channel = channel + 1 == channels ? 0 : channel + 1;
        }
    }
}

// As in_runs, over all elements, such that no run is in two grains.
template <typename Work>
static void in_grains(const Layout& layout, void* parallel, int threads, const Work& work) {
    in_chunks(layout.numel(), parallel, threads, [&](int64_t first, int64_t last) {
        for (int64_t at = first; at < last; at += GRAIN)
            in_runs(layout, at, at + GRAIN < last ? at + GRAIN : last, work);
    });
}

}  // namespace tq
