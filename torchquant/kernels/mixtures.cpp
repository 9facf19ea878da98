// The weighted sum of many projections of one tensor, and its gradients, in one pass each.
#include "forms.h"
#include "slices.h"

namespace tq {

enum Kind { TERNARY, POWERS_OF_TWO, FLOATS, SHIFTED_FLOATS, MIDRISE, SHIFTED_MIDRISE, UNIFORM, LEVELS };

// One of the projections.
struct Member {
    int64_t kind, n_rows;
    bool clips;            // whether the gradient is 0 where x is clipped
    const float* numbers;  // n_rows of all channels each: up to three numbers of the form, or the sorted levels
    const double* constants;
    float share;

    float constant(int i) const { return float(constants[i]); }
};

template <bool MASK, typename Form, typename Numbers>
static void form_run(const Form form, const float* __restrict v, float* __restrict out, int32_t* __restrict flags,
                     int64_t n, Numbers a, Numbers b, Numbers c) {
    for (int64_t i = 0; i < n; ++i) {
        out[i] = form.value(v[i], a[i], b[i], c[i]);
        if (MASK) flags[i] = int32_t(form.is_inside(v[i], a[i], b[i], c[i]));
    }
}

template <typename Numbers>
static void choose_level(const float* __restrict v, float* __restrict out, int64_t n, Numbers below, Numbers above) {
    for (int64_t i = 0; i < n; ++i) out[i] = v[i] > (above[i] + below[i]) / 2.0f ? above[i] : out[i];
}

template <typename Numbers>
static void finish_levels(const float* __restrict v, float* __restrict out, int32_t* __restrict flags, int64_t n,
                          Numbers low, Numbers high) {
    for (int64_t i = 0; i < n; ++i) out[i] += clamped(v[i], 0.0f, 0.0f);  // NaN has no level
    if (flags == nullptr) return;
    for (int64_t i = 0; i < n; ++i) flags[i] = int32_t((v[i] >= low[i]) & (v[i] <= high[i]));
}

// The values of n elements on the grid of a member, and whether each is not clipped if there are flags.
template <typename Of>
static void member_run(const Member& member, int64_t channels, const float* v, float* out, int32_t* flags, int64_t n,
                       Of of) {
    const auto row = [&](int64_t i) { return of(member.numbers + (i < member.n_rows ? i : 0) * channels); };
    const auto run = [&](auto form) {
        if (flags == nullptr) form_run<false>(form, v, out, flags, n, row(0), row(1), row(2));
        else form_run<true>(form, v, out, flags, n, row(0), row(1), row(2));
    };
    const auto constant = [&](int i) { return member.constant(i); };
    switch (member.kind) {
        case TERNARY: return run(Ternary{});
        case POWERS_OF_TWO: return run(PowersOfTwo{constant(0)});
        case FLOATS: return run(Floats<false>{constant(0), constant(1), constant(2), constant(3)});
        case SHIFTED_FLOATS: return run(Floats<true>{constant(0), constant(1), constant(2), constant(3)});
        case MIDRISE: return run(Midrise<false>{constant(0), constant(1)});
        case SHIFTED_MIDRISE: return run(Midrise<true>{constant(0), constant(1)});
        case UNIFORM: return run(Steps{});
        default: break;
    }
    const auto lowest = row(0);
    for (int64_t i = 0; i < n; ++i) out[i] = lowest[i];
    for (int64_t level = 1; level < member.n_rows; ++level) choose_level(v, out, n, row(level - 1), row(level));
    finish_levels(v, out, flags, n, lowest, row(member.n_rows - 1));
}

// A float sum in lanes, at most BLOCK / LANES numbers each, of products.
static double inner_product(const float* __restrict a, const float* __restrict b, int64_t n) {
    constexpr int64_t LANES = 32;
    float lanes[LANES] = {};
    double total = 0.0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int64_t k = 0; k < LANES; ++k) lanes[k] += a[i + k] * b[i + k];
    for (int64_t k = 0; k < LANES; ++k) total += double(lanes[k]);
    for (; i < n; ++i) total += double(a[i]) * double(b[i]);
    return total;
}

struct Mixture {
    Layout layout;
    Member* members;
    int64_t n_members;
    float low, high;     // what x is clamped to; -infinity and infinity: nothing
    float below, above;  // where the gradient of x is 0; NaN: nowhere

    Mixture(Layout layout, int64_t n_members, const int64_t* kinds, const double* constants, const float* numbers,
            const float* shares, double low, double high, double below, double above)
        : layout(layout), n_members(n_members), low(float(low)), high(float(high)), below(float(below)),
          above(float(above)) {
        members = static_cast<Member*>(std::malloc(n_members * sizeof(Member)));
        for (int64_t k = 0; members != nullptr && k < n_members; ++k) {
            const int64_t* own = kinds + 3 * k;
            members[k] = Member{own[0], own[1], own[2] != 0, numbers, constants + 4 * k, shares[k]};
            numbers += own[1] * layout.channels;
        }
    }
    ~Mixture() { std::free(members); }
    Mixture(const Mixture&) = delete;

    void clamp(const float* __restrict x, float* __restrict v, int64_t n) const {
        for (int64_t i = 0; i < n; ++i) v[i] = clamped(x[i], low, high);
    }

    template <typename Of>
    void project_run(const float* x, float* __restrict y, int64_t n, Of of) const {
        float v[BLOCK], q[BLOCK];
        clamp(x, v, n);
        for (int64_t k = 0; k < n_members; ++k) {
            const float share = members[k].share;
            member_run(members[k], layout.channels, v, q, nullptr, n, of);
            if (k == 0) for (int64_t i = 0; i < n; ++i) y[i] = q[i] * share;
            else for (int64_t i = 0; i < n; ++i) y[i] += q[i] * share;
        }
    }

    // for_x and sums, one for each member, may be nullptr.
    template <typename Of>
    void gradient_run(const float* __restrict x, const float* __restrict grad, float* __restrict for_x, double* sums,
                      int64_t n, Of of) const {
        float v[BLOCK], q[BLOCK];
        int32_t flags[BLOCK];
        clamp(x, v, n);
        for (int64_t k = 0; k < n_members; ++k) {
            const float share = members[k].share;
            const bool clips = members[k].clips && for_x != nullptr;
            if (clips || sums != nullptr) member_run(members[k], layout.channels, v, q, clips ? flags : nullptr, n, of);
            if (sums != nullptr) sums[k] += inner_product(grad, q, n);
            if (for_x == nullptr) continue;
            if (k == 0) for (int64_t i = 0; i < n; ++i) for_x[i] = 0.0f;
            if (clips) for (int64_t i = 0; i < n; ++i) for_x[i] += grad[i] * share * float(flags[i]);
            else for (int64_t i = 0; i < n; ++i) for_x[i] += grad[i] * share;
        }
        if (for_x == nullptr) return;
        for (int64_t i = 0; i < n; ++i) for_x[i] = (x[i] <= below) | (x[i] >= above) ? 0.0f : for_x[i];
    }
};

}  // namespace tq

#define MIXED                                                                                                          \
    int64_t outer, int64_t channels, int64_t inner, int64_t n_members, const int64_t *kinds, const double *constants,  \
        const float *numbers, const float *shares, double low, double high, double below, double above
#define MIXTURE                                                                                                        \
    const tq::Mixture mixture({outer, channels, inner}, n_members, kinds, constants, numbers, shares, low, high, below, \
                              above);                                                                                  \
    if (mixture.members == nullptr) return 1

EXPORT int mixture_float32(const float* x, float* y, MIXED, void* parallel, int threads) {
    MIXTURE;
    tq::expect_writes(y, mixture.layout.numel() * int64_t(sizeof(float)));
    tq::in_chunks(mixture.layout.numel(), parallel, threads, [&](int64_t first, int64_t last) {
        tq::in_runs(mixture.layout, first, last,
                    [&](int64_t at, int64_t n, auto of) { mixture.project_run(x + at, y + at, n, of); });
    });
    return 0;
}

// for_x and sums may be nullptr. Sums do not depend on the number of threads: those of GRAIN elements are added in order.
EXPORT int mixture_backward_float32(const float* x, const float* grad, float* for_x, double* sums, MIXED,
                                    void* parallel, int threads) {
    using namespace tq;
    MIXTURE;
    const int64_t grains = (mixture.layout.numel() + GRAIN - 1) / GRAIN;
    double* kept = static_cast<double*>(sums == nullptr ? nullptr : std::calloc(grains * n_members, sizeof(double)));
    if (sums != nullptr && kept == nullptr) return 1;
    if (for_x != nullptr) expect_writes(for_x, mixture.layout.numel() * int64_t(sizeof(float)));
    in_grains(mixture.layout, parallel, threads, [&](int64_t at, int64_t n, auto of) {
        double* own = kept == nullptr ? nullptr : kept + at / GRAIN * n_members;
        mixture.gradient_run(x + at, grad + at, for_x == nullptr ? nullptr : for_x + at, own, n, of);
    });
    for (int64_t k = 0; sums != nullptr && k < n_members; ++k) {
        sums[k] = 0.0;
        for (int64_t grain = 0; grain < grains; ++grain) sums[k] += kept[grain * n_members + k];
    }
    std::free(kept);
    return 0;
}
