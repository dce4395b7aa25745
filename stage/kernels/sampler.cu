#include <cooperative_groups.h>

#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/common/ptx.cuh"
#include "stage/kernels/common/sampling_weight.h"
#include "stage/kernels/sampler.h"

namespace qwen::kernels {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBins = kThreads;  // of a histogram: one a thread
constexpr int kClusterMax = 8;
constexpr int kFew = 256;  // candidates that one block finishes alone
constexpr uint32_t kAll = 0xffffffffu;

struct Shared {
  struct Histogram {
    uint32_t low[kBins], high[kBins];  // counts: `low` alone; masses: 64 bits in two words, because atomics on 64 bits are loops
  } histogram[2];
  uint64_t warp_value[kWarps];
  uint64_t inbox[2][kClusterMax];  // from each block of the cluster
  uint64_t found_before;
  uint32_t found_bin;
  // Of the block of rank 0: the candidates when they are few, by ascending id.
  float few_value[kFew];
  int few_id[kFew];
  uint64_t few_weight[kFew];
};
// The block's part of the row lies behind it, float32. Thread t owns the values [t * run, (t + 1) * run): an odd number, so that the 32 lanes
// of a warp meet different banks, and in the order of ids, so that a scan over threads is a scan over ids.
constexpr size_t kSharedLimit = 227 * 1024;

int SliceOf(int vocab, int cluster) { return ((vocab + cluster - 1) / cluster + 7) / 8 * 8; }
__host__ __device__ constexpr int RunOf(int slice) { return ((slice + kThreads - 1) / kThreads) | 1; }
size_t SharedBytes(int vocab, int cluster) { return sizeof(Shared) + SliceOf(vocab, cluster) * sizeof(float); }

// Order-preserving integer of a float; -0 is 0.
__device__ __forceinline__ uint32_t OrderedKey(float v) {
  const uint32_t bits = __float_as_uint(__fadd_rn(v, 0.0f));
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float FromOrderedKey(uint32_t key) { return __uint_as_float(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu)); }
constexpr uint64_t kNanKey = ~uint64_t{0};
// Greater: the greater logit, then the lower id.
__device__ __forceinline__ uint64_t RankedKey(float v, int id) {
  return v != v ? kNanKey : static_cast<uint64_t>(OrderedKey(v)) << 32 | static_cast<uint32_t>(~id);
}
__device__ __forceinline__ float LogitOf(uint64_t ranked) { return FromOrderedKey(static_cast<uint32_t>(ranked >> 32)); }
__device__ __forceinline__ int TokenOf(uint64_t ranked) { return static_cast<int>(~static_cast<uint32_t>(ranked)); }

struct Max {
  __device__ __forceinline__ static uint64_t Of(uint64_t a, uint64_t b) { return a > b ? a : b; }
};
struct MaxOfHalves {  // two 32-bit maxima at once
  __device__ __forceinline__ static uint64_t Of(uint64_t a, uint64_t b) {
    const uint64_t high = Max::Of(a >> 32, b >> 32), low = Max::Of(a & kAll, b & kAll);
    return high << 32 | low;
  }
};
struct SumOfDoubles {
  __device__ __forceinline__ static uint64_t Of(uint64_t a, uint64_t b) {
    return sampling_weight::Bits(__dadd_rn(sampling_weight::FromBits(a), sampling_weight::FromBits(b)));
  }
};

__device__ __forceinline__ uint64_t ShuffleXor(uint64_t v, int mask) { return __shfl_xor_sync(kAll, static_cast<unsigned long long>(v), mask); }
__device__ __forceinline__ uint64_t ShuffleUp(uint64_t v, int delta) { return __shfl_up_sync(kAll, static_cast<unsigned long long>(v), delta); }

// One thread's view of its row. Every method is called by all threads of the cluster.
struct Row {
  Shared& sm;
  float* values;  // of this block
  const cg::cluster_group cluster;
  const int ranks, rank;
  const int begin, count;  // ids of this block
  const int first, last;   // values of this thread
  int turn = 0;            // which inbox is next: whoever writes one has met everybody since the last use
  int histogram_turn = 0;

  // Over all threads of the cluster, blocks in the order of their ranks.
  template <typename Op>
  __device__ uint64_t Reduce(uint64_t v) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int mask = 16; mask > 0; mask >>= 1) v = Op::Of(v, ShuffleXor(v, mask));
    if (lane == 0) sm.warp_value[warp] = v;
    __syncthreads();
    if (warp == 0) {
      v = sm.warp_value[lane];
      for (int mask = 16; mask > 0; mask >>= 1) v = Op::Of(v, ShuffleXor(v, mask));
      if (lane < ranks) cluster.map_shared_rank(&sm.inbox[turn][0], lane)[rank] = v;
    }
    cluster.sync();
    uint64_t all = sm.inbox[turn][0];
    for (int r = 1; r < ranks; ++r) all = Op::Of(all, sm.inbox[turn][r]);
    turn ^= 1;
    return all;
  }

  // Inclusive sum over the threads of this block; `total`: of the block. A barrier has to follow before the next use.
  __device__ uint64_t BlockScan(uint64_t v, uint64_t& total) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const auto scan = [&](uint64_t x) {
      for (int delta = 1; delta < 32; delta <<= 1) {
        const uint64_t below = ShuffleUp(x, delta);
        if (lane >= delta) x += below;
      }
      return x;
    };
    v = scan(v);
    if (lane == 31) sm.warp_value[warp] = v;
    __syncthreads();
    if (warp == 0) sm.warp_value[lane] = scan(sm.warp_value[lane]);
    __syncthreads();
    total = sm.warp_value[kWarps - 1];
    return warp > 0 ? v + sm.warp_value[warp - 1] : v;
  }

  // Sum over all ids before this thread's; `total`: over the row.
  __device__ uint64_t ExclusiveScan(uint64_t v, uint64_t& total) {
    uint64_t block_total;
    uint64_t before = BlockScan(v, block_total) - v;
    if (static_cast<int>(threadIdx.x) < ranks) cluster.map_shared_rank(&sm.inbox[turn][0], threadIdx.x)[rank] = block_total;
    cluster.sync();
    total = 0;
    for (int r = 0; r < ranks; ++r) {
      if (r < rank) before += sm.inbox[turn][r];
      total += sm.inbox[turn][r];
    }
    turn ^= 1;
    return before;
  }

  // A histogram over the row in ascending bins: `bin(value, key)` is the value's bin, or negative when it has none. Returns this thread's
  // bin's sum and the sum up to and with it.
  struct Summed {
    uint64_t mine, inclusive, total;
  };
  template <bool kMass, typename Bin>
  __device__ Summed Histogram(float maximum, const Bin& bin) {
    Shared::Histogram& own = sm.histogram[histogram_turn];
    own.low[threadIdx.x] = 0;
    own.high[threadIdx.x] = 0;
    __syncthreads();
    for (int i = first; i < last; ++i) {
      const float v = values[i];
      const int at = bin(v);
      if (at < 0) continue;
      if constexpr (kMass) {
        const uint64_t weight = SamplingWeight(v, maximum);
        const auto low = static_cast<uint32_t>(weight);
        const uint32_t before = atomicAdd(&own.low[at], low);
        const uint32_t high = static_cast<uint32_t>(weight >> 32) + (before + low < before ? 1u : 0u);
        if (high != 0) atomicAdd(&own.high[at], high);
      } else {
        atomicAdd(&own.low[at], 1u);
      }
    }
    cluster.sync();
    Summed sum{};
    for (int r = 0; r < ranks; ++r) {
      const Shared::Histogram* theirs = cluster.map_shared_rank(&sm.histogram[histogram_turn], r);
      sum.mine += theirs->low[threadIdx.x];
      if constexpr (kMass) sum.mine += static_cast<uint64_t>(theirs->high[threadIdx.x]) << 32;
    }
    histogram_turn ^= 1;  // the other one: nobody reads it any more, all have met since
    sum.inclusive = BlockScan(sum.mine, sum.total);
    return sum;
  }

  // The bin in which a running sum that starts at `before` reaches `wanted`; `before` becomes the sum in front of that bin.
  __device__ uint32_t Find(const Summed& sum, uint64_t wanted, uint64_t& before) {
    const uint64_t reached = before + sum.inclusive;
    if (reached - sum.mine < wanted && wanted <= reached) {
      sm.found_bin = threadIdx.x;
      sm.found_before = reached - sum.mine;
    }
    __syncthreads();
    before = sm.found_before;
    return sm.found_bin;
  }

  // Where the count (kMass: the mass) of values from the greatest down, those below `floor` left out, reaches what is wanted.
  struct Selection {
    bool cut = false;  // else everything stays
    int bin = 0;       // the coarse bin where it happens
    uint64_t before = 0, wanted = 0;  // count or mass in front of it
    float value = 0;                  // after Refine: the last value to stay; `before`: of the greater ones
  };
  // Coarse bins are linear in the value, so that the values spread, and lie only where weights are. Rounded differences are monotone, which is
  // all that bins need. Negative: no bin.
  __device__ __forceinline__ static int CoarseBin(float v, float floor, float maximum) {
    constexpr float kScale = kBins / -kWeightlessBelow;
    const float below = __fsub_rn(maximum, v);
    return v >= floor && below <= -kWeightlessBelow ? min(static_cast<int>(__fmul_rn(below, kScale)), kBins - 1) : -1;
  }
  // `amount`: a count, or with kMass a fraction as WantedMass takes it.
  template <bool kMass>
  __device__ Selection Select(uint64_t amount, float floor, float maximum) {
    const Summed coarse = Histogram<kMass>(maximum, [&](float v) { return CoarseBin(v, floor, maximum); });
    Selection selection;
    selection.wanted = kMass ? WantedMass(amount, coarse.total) : amount;
    if (selection.wanted > coarse.total) {
      __syncthreads();  // as BlockScan wants
      return selection;
    }
    selection.cut = true;
    selection.bin = static_cast<int>(Find(coarse, selection.wanted, selection.before));
    return selection;
  }
  // Inside the coarse bin: what its keys span, a thousandth of the span at a time, until one key is left.
  template <bool kMass>
  __device__ void Refine(Selection& selection, float floor, float maximum) {
    uint64_t span = 0;  // (greatest key, complement of the least)
    for (int i = first; i < last; ++i) {
      const float v = values[i];
      if (CoarseBin(v, floor, maximum) != selection.bin) continue;
      const uint32_t key = OrderedKey(v);
      span = MaxOfHalves::Of(span, static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(~key));
    }
    span = Reduce<MaxOfHalves>(span);
    uint32_t high = static_cast<uint32_t>(span >> 32), low = ~static_cast<uint32_t>(span);
    while (low < high) {
      const int shift = max(0, 32 - __clz(static_cast<int>(high - low)) - 10);
      const auto digit = [&](float v) {
        const uint32_t key = OrderedKey(v);
        return key >= low && key <= high ? static_cast<int>((high - key) >> shift) : -1;
      };
      const Summed fine = Histogram<kMass>(maximum, digit);
      high -= Find(fine, selection.wanted, selection.before) << shift;
      const uint32_t width = (1u << shift) - 1;
      low = high - low > width ? high - width : low;
    }
    selection.value = FromOrderedKey(high);
  }

  // Brings the values down to coarse bin `bin` together in the block of rank 0, by ascending id, when they are few; how many they are, or 0
  // when they are not few.
  __device__ int Gather(int bin, float maximum) {
    const auto wanted = [&](float v) { return static_cast<unsigned>(CoarseBin(v, v, maximum)) <= static_cast<unsigned>(bin); };
    uint64_t mine = 0, total;
    for (int i = first; i < last; ++i) mine += wanted(values[i]) ? 1 : 0;
    const uint64_t before = ExclusiveScan(mine, total);
    if (total > kFew) return 0;
    if (mine > 0) {
      float* to_value = cluster.map_shared_rank(&sm.few_value[0], 0) + before;
      int* to_id = cluster.map_shared_rank(&sm.few_id[0], 0) + before;
      for (int i = first; i < last; ++i) {
        if (!wanted(values[i])) continue;
        *to_value++ = values[i];
        *to_id++ = begin + i;
      }
    }
    cluster.sync();
    return static_cast<int>(total);
  }

  // The id of the n-th value, by ascending id, that equals `value`; the greatest int when there are no more than n.
  __device__ int IdOfEqual(float value, uint64_t n) {
    uint64_t mine = 0, total;
    for (int i = first; i < last; ++i) mine += values[i] == value ? 1 : 0;
    const uint64_t before = ExclusiveScan(mine, total);
    if (n >= total) return 0x7fffffff;
    uint64_t id = 0;
    if (before < n && n <= before + mine) {
      uint64_t seen = before;
      for (int i = first; i < last; ++i) {
        if (values[i] != value || ++seen != n) continue;
        id = static_cast<uint64_t>(begin + i);
        break;
      }
    }
    return static_cast<int>(Reduce<Max>(id));
  }
};

// Raw logits into `values`, then whatever the row asks for: bias, penalties, bans (steps 1 to 4 of the pipeline).
__device__ void Load(const Row& row, const SamplerArgs& args, const SamplerRow& p) {
  const int vocab = args.vocab;
  const __nv_bfloat16* logits = args.logits + static_cast<size_t>(p.logits_row) * vocab + row.begin;
  if (p.bias_count > 0) {
    for (int i = threadIdx.x; i < row.count; i += kThreads) row.values[i] = 0.0f;
    __syncthreads();
    for (int i = threadIdx.x; i < p.bias_count; i += kThreads) {
      const int at = args.extra[p.bias_begin + 2 * i] - row.begin;
      if (at >= 0 && at < row.count) row.values[at] = __int_as_float(args.extra[p.bias_begin + 2 * i + 1]);
    }
    __syncthreads();
  }
  uint16_t* state = p.state >= 0 ? args.state + static_cast<size_t>(p.state) * vocab + row.begin : nullptr;
  const bool plain = p.bias_count == 0 && state == nullptr && p.mask_words < 0;
  constexpr int kAhead = 4, kStep = 8 * kThreads;
  for (int base = threadIdx.x * 8; base < row.count; base += kAhead * kStep) {
    uint4 raw[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (base + a * kStep < row.count) raw[a] = LoadActivation(logits + base + a * kStep);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int at = base + a * kStep;
      if (at >= row.count) break;
      float v[8];
      const uint32_t words[4] = {raw[a].x, raw[a].y, raw[a].z, raw[a].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[2 * i] = __uint_as_float(words[i] << 16);
        v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      }
      if (!plain) {
        uint32_t counts[4] = {0, 0, 0, 0};
        if (state != nullptr) {
          const uint4 s = LoadActivation(state + at);
          counts[0] = s.x, counts[1] = s.y, counts[2] = s.z, counts[3] = s.w;
        }
        const int id = row.begin + at;
        const uint32_t allowed = p.mask_words < 0 ? 0xff : id / 32 < p.mask_words ? static_cast<uint32_t>(args.extra[p.mask_begin + id / 32]) >> (id % 32) : 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (p.bias_count > 0) v[i] = __fadd_rn(v[i], row.values[at + i]);
          uint32_t s = i % 2 == 0 ? counts[i / 2] & 0xffff : counts[i / 2] >> 16;
          if (state != nullptr && id + i == p.append) {
            s = (s + 1) | 0x8000;
            state[at + i] = static_cast<uint16_t>(s);
          }
          if ((s & 0x8000) != 0 && p.repetition != 1.0f) v[i] = v[i] < 0 ? __fmul_rn(v[i], p.repetition) : __fdiv_rn(v[i], p.repetition);
          if ((s & 0x7fff) != 0) v[i] = __fsub_rn(v[i], __fadd_rn(p.presence, __fmul_rn(p.frequency, static_cast<float>(s & 0x7fff))));
          if ((allowed >> i & 1) == 0) v[i] = __uint_as_float(0xff800000u);
        }
      }
      if (p.token_limit > 0 && row.begin + at + 8 > p.token_limit) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (row.begin + at + i >= p.token_limit) v[i] = __uint_as_float(0xff800000u);
        }
      }
      float4* to = reinterpret_cast<float4*>(row.values + at);
      to[0] = make_float4(v[0], v[1], v[2], v[3]);
      to[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
  }
  __syncthreads();
  if (p.ban_count > 0) {
    for (int i = threadIdx.x; i < p.ban_count; i += kThreads) {
      const int at = args.extra[p.ban_begin + i] - row.begin;
      if (at >= 0 && at < row.count) row.values[at] = __uint_as_float(0xff800000u);
    }
    __syncthreads();
  }
}

// Steps 7 to 10 on `count` gathered candidates, by one block: each candidate's thread looks at all others. top_k > 0: top-k is still to be
// done and the mass that top-p wants is counted from what it leaves; else `wanted` is that mass (the greatest integer: no top-p).
__device__ int ChooseOfFew(Row& row, const SamplerRow& p, int count, uint64_t wanted, float maximum) {
  Shared& sm = row.sm;
  const int mine = static_cast<int>(threadIdx.x);
  const bool there = mine < count;
  const float value = there ? sm.few_value[mine] : 0.0f;
  uint64_t weight = there ? SamplingWeight(value, maximum) : 0, total;
  if (p.top_k > 0) {
    int greater = 0;
    for (int j = 0; there && j < count; ++j) greater += sm.few_value[j] > value ? 1 : 0;
    if (greater >= p.top_k) weight = 0;
  }
  if (there) sm.few_weight[mine] = weight;
  row.BlockScan(weight, total);
  __syncthreads();
  if (p.top_k > 0) wanted = p.top_p < kNoTopP ? WantedMass(p.top_p, total) : ~uint64_t{0};
  uint64_t before = 0;
  for (int j = 0; there && j < count && wanted != ~uint64_t{0}; ++j) {
    const float other = sm.few_value[j];
    if (other > value || (other == value && j < mine)) before += sm.few_weight[j];
  }
  if (before >= wanted || weight < p.min_p) weight = 0;
  const uint64_t through = row.BlockScan(weight, total), target = DrawnUnit(p.draw, total);
  if (through - weight <= target && target < through) sm.found_bin = static_cast<uint32_t>(sm.few_id[mine]);
  __syncthreads();
  return static_cast<int>(sm.found_bin);
}

// Steps 5 to 10: the token, known to the block of rank 0. Scales `values`.
__device__ int Choose(Row& row, const SamplerRow& p, int32_t& status) {
  const float minus_infinity = __uint_as_float(0xff800000u);
  float greatest = minus_infinity;
  int at = -1;
  bool nan = false;
  for (int i = row.first; i < row.last; ++i) {
    const float v = row.values[i];
    nan |= v != v;
    if (v > greatest) greatest = v, at = i;  // strictly: the lowest id
  }
  const uint64_t best = row.Reduce<Max>(nan ? kNanKey : at >= 0 ? RankedKey(greatest, row.begin + at) : 0);
  status = best == kNanKey ? kSamplerNan : best == 0 ? kSamplerNothingAllowed : kSamplerDone;
  if (status != kSamplerDone) return 0;
  greatest = LogitOf(best);
  const float temperature = p.temperature;
  const float maximum = temperature == 0.0f ? greatest : __fdiv_rn(greatest, temperature);
  if (temperature == 0.0f || isinf(greatest) || isinf(maximum)) return TokenOf(best);  // near 0 a temperature overflows: greedy is what is left
  // Divided is what may weigh something. Beyond 29.5 T, and what rounding may add to a quotient, nothing does.
  const float least = __fsub_rn(__fsub_rn(greatest, __fmul_rn(29.5f, temperature)), __fmul_rn(fabsf(greatest), 0x1p-21f));
  for (int i = row.first; i < row.last; ++i) {
    const float v = row.values[i];
    row.values[i] = v < least ? minus_infinity : temperature == 1.0f ? v : __fdiv_rn(v, temperature);
  }

  float floor = minus_infinity;
  int last_equal = 0x7fffffff;  // of the values that equal floor, ids up to here stay
  if (p.top_k > 0) {
    Row::Selection kept = row.Select<false>(static_cast<uint64_t>(p.top_k), floor, maximum);
    if (kept.cut) {
      if (const int few = row.Gather(kept.bin, maximum); few > 0) return row.rank == 0 ? ChooseOfFew(row, p, few, 0, maximum) : 0;
      row.Refine<false>(kept, floor, maximum);
      floor = kept.value;
    }
  }
  if (p.top_p < kNoTopP) {
    Row::Selection kept = row.Select<true>(p.top_p, floor, maximum);
    if (p.top_k <= 0) {
      if (const int few = row.Gather(kept.bin, maximum); few > 0) return row.rank == 0 ? ChooseOfFew(row, p, few, kept.wanted, maximum) : 0;
    }
    row.Refine<true>(kept, floor, maximum);
    const uint64_t weight = SamplingWeight(kept.value, maximum);  // not 0: mass was reached there
    floor = kept.value;
    last_equal = row.IdOfEqual(kept.value, (kept.wanted - kept.before + weight - 1) / weight);
  }
  const auto weigh = [&](int i) -> uint64_t {
    const float v = row.values[i];
    if (!(v >= floor) || (v == floor && row.begin + i > last_equal) || __fsub_rn(maximum, v) > -kWeightlessBelow) return 0;
    const uint64_t weight = SamplingWeight(v, maximum);
    return weight >= p.min_p ? weight : 0;
  };
  uint64_t mine = 0, total;
  for (int i = row.first; i < row.last; ++i) mine += weigh(i);
  const uint64_t before = row.ExclusiveScan(mine, total);
  const uint64_t target = DrawnUnit(p.draw, total);
  uint64_t token = 0;
  if (before <= target && target < before + mine) {
    uint64_t sum = before;
    for (int i = row.first; i < row.last; ++i) {
      sum += weigh(i);
      if (sum <= target) continue;
      token = static_cast<uint64_t>(row.begin + i);
      break;
    }
  }
  return static_cast<int>(row.Reduce<Max>(token));
}

// Of the raw logits, which are loaded again. By one extraction of the maximum after the other: a thread looks through its values anew
// only when one of them was taken.
__device__ void Logprobs(Row& row, const SamplerArgs& args, const SamplerRow& p, int token, SamplerResult& result) {
  const __nv_bfloat16* logits = args.logits + static_cast<size_t>(p.logits_row) * args.vocab;
  __syncthreads();
  for (int i = threadIdx.x; i < row.count; i += kThreads) row.values[i] = __bfloat162float(logits[row.begin + i]);
  __syncthreads();
  const auto best_below = [&](uint64_t limit) {
    uint64_t best = 0;
    for (int i = row.first; i < row.last; ++i) {
      const uint64_t key = RankedKey(row.values[i], row.begin + i);
      if (key < limit) best = Max::Of(best, key);
    }
    return best;
  };
  uint64_t local = best_below(kNanKey);
  uint64_t taken = row.Reduce<Max>(local);
  const double maximum = static_cast<double>(LogitOf(taken));
  double sum = 0;
  for (int i = row.first; i < row.last; ++i) {
    const double below = __dsub_rn(static_cast<double>(row.values[i]), maximum);
    sum = __dadd_rn(sum, below > -690.0 ? sampling_weight::ScaledExp(below, 0, 0.0) : 0.0);
  }
  const double all = sampling_weight::FromBits(row.Reduce<SumOfDoubles>(sampling_weight::Bits(sum)));
  const double normaliser = maximum + log(all);
  const bool writes = row.rank == 0 && threadIdx.x == 0;
  if (writes) result.logprob = static_cast<float>(static_cast<double>(__bfloat162float(logits[token])) - normaliser);
  const int wanted = min(p.logprobs, kSamplerLogprobsMax);
  for (int n = 0; n < wanted; ++n) {
    if (writes) {
      result.top_token[n] = TokenOf(taken);
      result.top_logprob[n] = static_cast<float>(static_cast<double>(LogitOf(taken)) - normaliser);
    }
    if (local == taken) local = best_below(taken);
    taken = row.Reduce<Max>(local);
  }
}

__global__ void __launch_bounds__(kThreads, 1) SamplerKernel(const SamplerArgs args, int slice) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& sm = *reinterpret_cast<Shared*>(memory);
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank()), begin = rank * slice;
  const int count = max(0, min(slice, args.vocab - begin)), run = RunOf(slice);
  const int first = min(static_cast<int>(threadIdx.x) * run, count), last = min(first + run, count);
  Row row{sm, reinterpret_cast<float*>(memory + sizeof(Shared)), cluster, static_cast<int>(cluster.num_blocks()), rank, begin, count, first, last};
  cluster.sync();  // before anybody writes into another block's memory: that block runs
  GridDependencyWait();
  GridDependencyLaunch();
  const SamplerRow p = args.rows[blockIdx.y];
  SamplerResult& result = args.results[blockIdx.y];
  Load(row, args, p);
  int32_t status;
  const int token = Choose(row, p, status);
  if (p.logprobs >= 0 && status == kSamplerDone) Logprobs(row, args, p, token, result);
  if (rank == 0 && threadIdx.x == 0) {
    result.token = token;
    result.status = status;
  }
  cluster.sync();  // nobody leaves while another block may still look into its memory
}

// One block: it runs once a sequence.
__global__ void __launch_bounds__(kThreads) FillStateKernel(uint16_t* state, const int32_t* tokens, int count, int prompt, int vocab) {
  GridDependencyWait();
  GridDependencyLaunch();
  auto* words = reinterpret_cast<uint32_t*>(state);
  for (int i = threadIdx.x; i < vocab / 2; i += kThreads) words[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int token = tokens[i], shift = token % 2 * 16;
    if (token < 0 || token >= vocab) continue;
    atomicOr(&words[token / 2], 0x8000u << shift);
    if (i >= prompt) atomicAdd(&words[token / 2], 1u << shift);
  }
}

}  // namespace

bool SamplerTakes(int vocab) { return vocab >= 8 && vocab % 8 == 0 && SharedBytes(vocab, 4) <= kSharedLimit; }

cudaError_t Sample(const SamplerArgs& args, cudaStream_t stream, int cluster) {
  if (args.count < 1 || args.count > 65535 || !SamplerTakes(args.vocab)) return cudaErrorInvalidValue;
  if (cluster == 0) cluster = args.count <= 8 ? 8 : 4;
  if (cluster != 1 && cluster != 2 && cluster != 4 && cluster != 8) return cudaErrorInvalidValue;
  if (SharedBytes(args.vocab, cluster) > kSharedLimit) return cudaErrorInvalidValue;
  return Launch(SamplerKernel,
                {.grid = dim3(static_cast<unsigned>(cluster), static_cast<unsigned>(args.count)),
                 .block = dim3(kThreads),
                 .shared_bytes = SharedBytes(args.vocab, cluster),
                 .cluster_x = cluster},
                stream, args, SliceOf(args.vocab, cluster));
}

cudaError_t FillSamplerState(uint16_t* state, const int32_t* tokens, int count, int prompt, int vocab, cudaStream_t stream) {
  if (count < 0 || prompt < 0 || !SamplerTakes(vocab)) return cudaErrorInvalidValue;
  return Launch(FillStateKernel, {.grid = dim3(1), .block = dim3(kThreads)}, stream, state, tokens, count, prompt, vocab);
}

}  // namespace qwen::kernels
