// What all kernels share: chunks that run on the threads of torch, and masks of one bit an element.
//
// No header of torch or of Python is needed: tensors come as pointers. Loops are written so that a compiler vectorises
// them; what one cannot is under __AVX2__, with a plain form beside it that -DTQ_GENERIC chooses.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AVX2__) && !defined(TQ_GENERIC)
#include <immintrin.h>
#define TQ_AVX2 1
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace tq {

constexpr int64_t BLOCK = 1024;       // elements whose flags are kept before they are packed; a multiple of 8
constexpr int64_t GRAIN = 16 * BLOCK; // fewest elements that a thread takes at a time
constexpr int64_t HUGE_PAGE = 1 << 21;

// Threads of torch: `GOMP_parallel` of the OpenMP library that torch has loaded, and how many to use; none: nullptr, 1.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

template <typename Work>
struct Chunks {
    const Work* work;
    int64_t n;
    int64_t size;
    std::atomic<int64_t> next;

    static void take(void* shared) {
        Chunks* own = static_cast<Chunks*>(shared);
        for (int64_t first; (first = own->next.fetch_add(own->size)) < own->n;) {
            (*own->work)(first, first + own->size < own->n ? first + own->size : own->n);
        }
    }
};

// Call `work(first, last)` for parts of 0 .. n that begin at multiples of GRAIN. No result may depend on the parts.
template <typename Work>
static void in_chunks(int64_t n, void* parallel, int threads, const Work& work) {
    if (parallel == nullptr || threads <= 1 || n < 2 * GRAIN) {
        work(int64_t(0), n);
        return;
    }
    int64_t size = (n / (4 * threads) / GRAIN + 1) * GRAIN;
    Chunks<Work> chunks{&work, n, size, {0}};
    reinterpret_cast<Parallel>(parallel)(Chunks<Work>::take, &chunks, unsigned(threads), 0);
}

// Ask for huge pages for a new large tensor: writing it the first time is then several times faster.
static inline void expect_writes(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (bytes < 4 * HUGE_PAGE) return;
    uintptr_t first = (reinterpret_cast<uintptr_t>(data) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / HUGE_PAGE * HUGE_PAGE;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// An integer as wide as T, in which a comparison of numbers T is -1 or 0.
template <typename T> struct FlagOf;
template <> struct FlagOf<float> { typedef int32_t type; };
template <> struct FlagOf<double> { typedef int64_t type; };
template <typename T> using Flag = typename FlagOf<T>::type;

// Pack n flags, -1 or 0, eight to a byte, the first in the lowest bit; the bits of a last byte beyond n are 0.
template <typename F>
static inline void pack(const F* flags, uint8_t* bits, int64_t n) {
    int64_t i = 0;
#if TQ_AVX2
    for (; i + 8 <= n; i += 8) {
        const __m256i* at = reinterpret_cast<const __m256i*>(flags + i);
        if (sizeof(F) == 4) {
            bits[i / 8] = uint8_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_loadu_si256(at))));
        } else {
            int low = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_loadu_si256(at)));
            int high = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_loadu_si256(at + 1)));
            bits[i / 8] = uint8_t(low | high << 4);
        }
    }
#endif
    for (; i < n; i += 8) {
        int byte = 0;
        for (int k = 0; k < 8 && i + k < n; ++k) byte |= int(flags[i + k] & 1) << k;
        bits[i / 8] = uint8_t(byte);
    }
}

// The smaller, or larger, of two numbers; NaN if one is.
template <typename T>
static inline T lesser(T held, T x) { return (x < held) | (x != x) ? x : held; }
template <typename T>
static inline T greater(T held, T x) { return (x > held) | (x != x) ? x : held; }

// A number of each channel: n of them, 1 for all channels, or a plain one.
template <typename T>
struct Number {
    const T* given;
    int64_t n;
    double plain;
    T of(int64_t c) const { return given == nullptr ? T(plain) : given[n == 1 ? 0 : c]; }
};

// One number for all elements, or one for each.
template <typename T>
struct Same {
    T number;
    T operator[](int64_t) const { return number; }
};

template <typename T>
struct Each {
    const T* numbers;
    T operator[](int64_t i) const { return numbers[i]; }
};

// Numbers of each channel, in rows: on the stack if they are few.
template <typename T>
struct Rows {
    T few[192];
    T* all;
    int64_t channels;

    Rows(int64_t n, int64_t channels) : all(few), channels(channels) {
        if (n * channels > 192) all = static_cast<T*>(std::malloc(n * channels * sizeof(T)));
    }
    ~Rows() { if (all != few) std::free(all); }
    Rows(const Rows&) = delete;
    bool is_missing() const { return all == nullptr; }
    T* operator[](int64_t row) { return all + row * channels; }
};

// A tensor in the order of memory: `outer` times `channels` times `inner`; channels 1 if its numbers are of all of it.
struct Walk {
    int64_t outer, channels, inner;
    int64_t n() const { return outer * channels * inner; }

    // Call `work(is_across, c, at, n)` for stretches of n elements from `at`: of channel c, or, if `is_across`, one
    // of each of n channels from c.
    template <typename Work>
    inline void run(int64_t first, int64_t last, const Work& work) const {
        if (channels == 1) {
            work(false, int64_t(0), first, last - first);
            return;
        }
        int64_t c = first / inner % channels, left = inner == 1 ? channels - c : inner - first % inner;
        for (int64_t at = first; at < last;) {
            int64_t n = left < last - at ? left : last - at;
            work(inner == 1, c, at, n);
            at += n;
            c = inner == 1 || c + 1 == channels ? 0 : c + 1;
            left = inner == 1 ? channels : inner;
        }
    }
};

}  // namespace tq

// A `Walk` among the parameters of an exported function, and made of them.
#define WALK int64_t outer, int64_t channels, int64_t inner
#define THE_WALK (tq::Walk{outer, channels, inner})
// A `Number` among the parameters of an exported function, and made of them.
#define NUMBER(T, NAME) const T *NAME, int64_t n_##NAME, double plain_##NAME
#define GIVEN(T, NAME) (tq::Number<T>{NAME, n_##NAME, plain_##NAME})
