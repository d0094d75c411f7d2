// Rows of contiguous elements, each read by a team of threads: held in registers between its visits
// while it fits, read again, window by window, where it does not. And a row's running maximum and
// sum of exponentials. No formula but that.
#pragma once
#include "../formulas/softmax.h"
#include "arithmetic.cuh"
#include "launch.cuh"
#include "pack.cuh"
#include "team.cuh"

namespace fastops::cuda {

// ------------------------------------------------------------------------------------------------
// maxima

// Of the elements of packs.
template <class scalar_t>
struct Peak {
  real_of<scalar_t> value = -std::numeric_limits<real_of<scalar_t>>::infinity();
  __device__ __forceinline__ void add(const Raw<scalar_t, pack_size<scalar_t>>& raw) {
    real_of<scalar_t> v[pack_size<scalar_t>];
    raw.values(v);
#pragma unroll
    for (const auto& x : v) value = maximum(value, x);
  }
  __device__ __forceinline__ void add(scalar_t x) {
    value = maximum(value, static_cast<real_of<scalar_t>>(x));
  }
  __device__ __forceinline__ real_of<scalar_t> result() const { return value; }
};
#if !defined(FASTOPS_EMULATION)
// Two at a time, as they were loaded.
template <class scalar_t>
  requires(sizeof(scalar_t) == 2)
struct Peak<scalar_t> {
  static constexpr bool bfloat = std::is_same_v<scalar_t, c10::BFloat16>;
  uint32_t pair = bfloat ? 0xFF80FF80u : 0xFC00FC00u;  // -inf twice
  __device__ __forceinline__ void add(uint32_t word) {
    if constexpr (bfloat) {
      asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(pair), "r"(word));
    } else {
      asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(pair), "r"(word));
    }
  }
  __device__ __forceinline__ void add(const Raw<scalar_t, pack_size<scalar_t>>& raw) {
    uint4 words;
    memcpy(&words, &raw, sizeof words);
    add(words.x), add(words.y), add(words.z), add(words.w);
  }
  __device__ __forceinline__ void add(scalar_t x) {
    uint16_t half;
    memcpy(&half, &x, sizeof half);
    add(uint32_t{half} << 16 | half);
  }
  __device__ __forceinline__ float result() const {
    scalar_t halves[2];
    memcpy(halves, &pair, sizeof halves);
    return maximum(static_cast<float>(halves[0]), static_cast<float>(halves[1]));
  }
};
#endif

// ------------------------------------------------------------------------------------------------
// teams

constexpr int kWarpBlock = 128;  // threads of a block whose warps take a row each

// Packs of a row that a thread has in registers at a time: 64 bytes are asked for before the first
// is needed. Where a block of 1024 would not have the registers, one of 512 has twice as many.
template <class scalar_t, int threads, int inputs>
constexpr int kSlots = inputs == 2 && threads == 512 && sizeof(scalar_t) == 4 ? 8 : 4;

// Threads of a block that reads its row again.
template <class scalar_t>
constexpr int kLongRowBlock = sizeof(scalar_t) == 8 ? 256 : 512;

template <int threads>
constexpr int kBlock = threads == kWarp ? kWarpBlock : threads;

// The blocks of a multiprocessor: as many as leave 64 registers to a thread, or 128 where it holds
// two rows, computes in double, or goes through windows of a row.
template <class scalar_t, int threads, bool held, int inputs>
constexpr int kRowBlocks =
    (held && inputs == 1 && sizeof(scalar_t) < 8 ? 1024 : 512) / kBlock<threads>;
template <class scalar_t, int inputs>
constexpr int kLongestTeam = inputs == 2 || sizeof(scalar_t) == 8 ? 512 : 1024;

// ------------------------------------------------------------------------------------------------
// a row in registers

template <class scalar_t>
__host__ __device__ __forceinline__ bool same_alignment(const scalar_t* a, const scalar_t* b) {
  return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % kPackBytes == 0;
}

// `inputs` rows of one shape. Whole packs, at the boundaries of the first's memory, are dealt out
// to the threads of the team; the few elements before the first pack and after the last one each to
// a thread. The second row is read in packs too where `wide` says that its boundaries fall
// together.
template <class scalar_t, int threads, bool held, int inputs>
struct RowTile {
  using real = real_of<scalar_t>;
  static constexpr int size = pack_size<scalar_t>,
                       slots = held ? kSlots<scalar_t, threads, inputs> : 4;
  static constexpr bool exact = std::is_same_v<real, scalar_t>;  // values can be written back
  using index_t = std::conditional_t<held, int, int64_t>;        // what is held is short

  const scalar_t* p[inputs];
  bool wide;
  int rank, head, edges;  // edges: elements outside of packs
  index_t n, packs;
  scalar_t filler;  // of the first row, where there is no element; 0 of the second
  Raw<scalar_t, size> raw[inputs][slots];
  scalar_t edge[inputs];

  __device__ __forceinline__ RowTile(int64_t length, const scalar_t* first, const scalar_t* second,
                                     bool wide, real filler, int rank)
      : wide(wide),
        rank(rank),
        n(static_cast<index_t>(length)),
        filler(static_cast<scalar_t>(filler)) {
    const AlignedSpan span = aligned_span(length, size, first);
    head = static_cast<int>(span.head);
    packs = static_cast<index_t>(span.packs);
    edges = static_cast<int>(n - packs * size);
    p[0] = first;
    if constexpr (inputs == 2) p[1] = second;
    if constexpr (held) load_window(0);
#pragma unroll
    for (int j = 0; j < inputs; ++j)
      edge[j] = rank < edges ? load(p[j] + edge_index()) : j == 0 ? this->filler : scalar_t(0);
  }

  __device__ __forceinline__ index_t edge_index() const {
    return rank < head ? rank : rank + packs * size;
  }
  __device__ __forceinline__ index_t index_of(index_t pack) const { return head + pack * size; }

  // Asks for the packs from `first` on, `slots` for each thread; none is converted here.
  __device__ __forceinline__ void load_window(index_t first) {
#pragma unroll
    for (int s = 0; s < slots; ++s) {
      if (first + s * threads >= packs) break;  // of the whole team
      const index_t pack = first + s * threads + rank;
      const bool has = pack < packs;
#pragma unroll
      for (int j = 0; j < inputs; ++j) {
        if (has && (j == 0 || wide)) {
          raw[j][s].load_from(p[j] + index_of(pack));
        } else {
#pragma unroll
          for (int k = 0; k < size; ++k) {
            raw[j][s][k] = j == 0 ? filler : scalar_t(0);
            if (j == 1 && has) raw[j][s][k] = load(p[j] + index_of(pack) + k);
          }
        }
      }
    }
  }

  // body(slot, pack of this thread) for each slot in which the team has a pack, of the window from
  // `first` on.
  template <class Body>
  __device__ __forceinline__ void each_slot(index_t first, Body body) {
#pragma unroll
    for (int s = 0; s < slots; ++s) {
      if (first + s * threads >= packs) break;
      body(s, first + s * threads + rank);
    }
  }
  // begin() before each window, which is the row where it is held, and body(slot, pack) for its
  // slots.
  template <class Begin, class Body>
  __device__ __forceinline__ void each_window(Begin begin, Body body) {
    if constexpr (held) {
      begin(index_t(0));
      each_slot(0, body);
    } else {
#pragma unroll 1
      for (index_t first = 0; first < packs; first += slots * threads) {
        load_window(first);
        begin(first);
        each_slot(first, body);
      }
    }
  }

  __device__ __forceinline__ void peak_of_window(index_t first, Peak<scalar_t>& peak) {
    each_slot(first, [&](int s, index_t) { peak.add(raw[0][s]); });
  }

  // body(index of the first, values[inputs][n], whether the row has them) for the packs of the row,
  // begin(index of the first pack) before each window, and body once more for the edge. Where
  // `keep` is set, what it leaves in the first row's values is what the next visit finds.
  template <bool keep, class Begin, class Body>
  __device__ __forceinline__ void each(Begin begin, Body body) {
    static_assert(!keep || (held && exact));
    each_window(begin, [&](int s, index_t pack) {
      real v[inputs][size];
#pragma unroll
      for (int j = 0; j < inputs; ++j) raw[j][s].values(v[j]);
      body(index_of(pack), v, pack < packs);
      if constexpr (keep)
#pragma unroll
        for (int k = 0; k < size; ++k) raw[0][s][k] = v[0][k];
    });
    if (edges == 0) return;
    real v[inputs][1];
#pragma unroll
    for (int j = 0; j < inputs; ++j) v[j][0] = static_cast<real>(edge[j]);
    body(edge_index(), v, rank < edges);
    if constexpr (keep) edge[0] = v[0][0];
  }
  template <bool keep = false, class Body>
  __device__ __forceinline__ void each(Body body) {
    each<keep>([](index_t) {}, body);
  }

  // The same elements of another row, in packs where `whole` says that the boundaries fall
  // together.
  template <int count>
  __device__ __forceinline__ void put(scalar_t* to, bool whole, index_t i, const real (&v)[count],
                                      bool has) const {
    if (!has) return;
    if constexpr (count == 1) {
      store(to + i, static_cast<scalar_t>(v[0]));
    } else if (whole) {
      store_wide(to + i, v);
    } else {
#pragma unroll
      for (int k = 0; k < count; ++k) store(to + i + k, static_cast<scalar_t>(v[k]));
    }
  }
};

// Writes zeros over a row.
template <int threads, class scalar_t>
__device__ __forceinline__ void zero_row(scalar_t* p, int64_t n, int rank) {
  constexpr int size = pack_size<scalar_t>;
  for_each_pack<size>(
      aligned_span(n, size, p), rank, threads,
      [&](int64_t i) {
        const real_of<scalar_t> zeros[size] = {};
        store_wide(p + i, zeros);
      },
      [&](int64_t i) { store(p + i, scalar_t(0)); });
}

// The maximum of the row and the sum of exp(x - maximum). Each thread keeps a maximum of its own,
// and threads are joined once, at the end: joining pack by pack costs twice the instructions.
// visitor(i, values, whether the row has them, base) sees every pack with the base that the
// thread's exponentials have at that time. With `keep`, x becomes exp(x - maximum).
template <bool keep, int threads, class scalar_t, bool held, int inputs, class Visitor>
__device__ __forceinline__ LogSumExp<real_of<scalar_t>> online_softmax(
    RowTile<scalar_t, threads, held, inputs>& tile, const Team<threads>& team, Visitor visitor) {
  using real = real_of<scalar_t>;
  LogSumExp<real> mine;
  Peak<scalar_t> peak;
  peak.add(tile.edge[0]);
  real base = 0;
  // Moves the sum to the peak of what the thread has seen.
  const auto rescale = [&](real to) {
    if (to == mine.peak) return;
    const real next = LogSumExp<real>::origin(to);
    mine.sum *= exp_below(mine.peak - next);
    mine.peak = to;
    base = next;
  };
  if constexpr (held) {
    tile.peak_of_window(0, peak);
    mine.peak = team.maximum(peak.result());
    base = LogSumExp<real>::origin(mine.peak);
  } else {
    rescale(peak.result());  // of the edge
  }
  tile.template each<keep>(
      [&](auto first) {
        if constexpr (!held) {
          tile.peak_of_window(first, peak);
          rescale(peak.result());
        }
      },
      [&](auto i, auto& v, bool has) {
        visitor(i, v, has, base);
        real few = 0;
#pragma unroll
        for (real& x : v[0]) {
          const real e = exp_below(x - base);
          few += e;
          if constexpr (keep) x = e;
        }
        mine.sum += few;
      });
  if constexpr (!held) rescale(team.maximum(mine.peak));
  mine.sum = team.sum(mine.sum);
  return mine;
}

// ------------------------------------------------------------------------------------------------
// launches

// Row by row for teams of 32 threads, several in a block, or of the whole block.
template <int threads, class Body>
__device__ __forceinline__ void each_row(int64_t rows, Body body) {
  const int64_t teams = kBlock<threads> / threads, step = int64_t{gridDim.x} * teams;
  for (int64_t r = int64_t{blockIdx.x} * teams + threadIdx.x / threads; r < rows; r += step)
    body(r);
}

// Who takes `inputs` rows of n elements: run(threads of the team, whether they hold them).
template <class scalar_t, int inputs, class Run>
Error by_length(int64_t n, Run run) {
  const auto fits = [&](auto threads) {
    return n <= int64_t{threads} * kSlots<scalar_t, threads, inputs> * pack_size<scalar_t>;
  };
  constexpr std::integral_constant<int, 32> warp;
  constexpr std::integral_constant<int, 128> few;
  constexpr std::integral_constant<int, 512> many;
  if (fits(warp)) return run(warp, std::true_type{});
  if (fits(few)) return run(few, std::true_type{});
  if (fits(many)) return run(many, std::true_type{});
  if constexpr (kLongestTeam<scalar_t, inputs> == 1024) {
    constexpr std::integral_constant<int, 1024> most;
    if (fits(most)) return run(most, std::true_type{});
  }
  return run(std::integral_constant<int, kLongRowBlock<scalar_t>>{}, std::false_type{});
}

template <int threads, class... Parameters, class... Arguments>
Error launch_rows(void (*kernel)(Parameters...), void* stream, int64_t rows,
                  Arguments... arguments) {
  constexpr int teams = kBlock<threads> / threads;
  const int64_t blocks = std::min<int64_t>((rows + teams - 1) / teams, INT32_MAX);
  return launch(kernel, blocks, kBlock<threads>, stream, rows, arguments...);
}

}  // namespace fastops::cuda
