// The elementwise loop: any number of tensors in, dense or broadcast, any number out, and a formula
// between them. Tails, alignment, streaming past the caches and threads are decided here, once. No
// formula.
#pragma once
#include "parallel.h"
#include "vec_io.h"

namespace fastops::CPU_CAPABILITY {
namespace {

constexpr int64_t kElementwiseGrain = 16384;  // elements a thread takes at least

// A tensor that is read: rows of `period` elements, each `stride` behind the one before, every
// element of them `repeat` times. Beside element i of the result stands element i / repeat of that.
// The defaults are those of a dense tensor; a stride of 0 broadcasts a row.
template <class scalar_t>
struct Operand {
  const scalar_t* data;
  int64_t period = 0, repeat = 1, stride = 0;  // a period of 0: of all elements
};

// A tensor that is written: dense, or in rows.
template <class scalar_t>
struct Result {
  scalar_t* data;
  int64_t period = 0, stride = 0;
};

// Where a run of elements is read: one after the other, or one element for all.
template <class scalar_t>
struct Source {
  const scalar_t* p;
  bool uniform;
};

// Operands side by side; the bits of `broadcast` say which of them may be more than dense.
template <class scalar_t, int inputs, unsigned broadcast>
struct Operands {
  Operand<scalar_t> in[inputs];

  static constexpr bool may_broadcast(int k) { return broadcast >> k & 1; }

  // Calls body(i, source, n) for the runs of [begin, end) in which every operand is either one
  // element or elements that follow each other. `bound` ends the runs of the results.
  template <class Bound, class Body>
  FASTOPS_FN void for_each_run(int64_t begin, int64_t end, Bound bound, Body body) const {
    Source<scalar_t> source[inputs];
    if constexpr (broadcast == 0) {
      for (int k = 0; k < inputs; ++k) source[k] = {in[k].data + begin, false};
      body(begin, source, end - begin);
    } else {
      for (int64_t i = begin; i < end;) {
        int64_t n = bound(i, end - i);
        for (int k = 0; k < inputs; ++k) {
          if (may_broadcast(k)) {
            const int64_t run = locate(in[k], i, source[k]);
            if (run < n) n = run;
          } else {
            source[k] = {in[k].data + i, false};
          }
        }
        body(i, source, n);
        i += n;
      }
    }
  }
  template <class Body>
  FASTOPS_FN void for_each_run(int64_t begin, int64_t end, Body body) const {
    for_each_run(begin, end, [](int64_t, int64_t n) { return n; }, body);
  }

  // Calls body(i, n, x) for the vectors of [begin, end), n < L::size in the last of a run only; see
  // for_each_vector().
  template <class L, bool hot = true, class Body>
  FASTOPS_FN void for_each_vector(int64_t begin, int64_t end, Body body) const {
    for_each_run(begin, end, [&](int64_t at, const Source<scalar_t>(&source)[inputs], int64_t run) {
      CPU_CAPABILITY::for_each_vector<L::size, hot>(0, run, [&](int64_t i, auto n) {
        typename L::V x[inputs][L::count];
        for (int k = 0; k < inputs; ++k) {
          if (may_broadcast(k) && source[k].uniform) {
            for (auto& v : x[k]) v = typename L::V(L::one(source[k].p));
          } else {
            L::load(source[k].p + i, n, x[k]);
          }
        }
        body(at + i, n, x);
      });
    });
  }

  // Whether all runs are of whole vectors.
  template <class L>
  FASTOPS_FN bool whole_vectors() const {
    for (int k = 0; k < inputs; ++k)
      if (may_broadcast(k) && !uniform(in[k]) &&
          (in[k].repeat > 1 ? in[k].repeat : in[k].period) % L::size != 0)
        return false;
    return true;
  }

 private:
  static FASTOPS_FN bool uniform(const Operand<scalar_t>& o) {
    return o.period == 1 && o.stride == 0;
  }
  // How many elements from i on are read as `source` then says.
  static FASTOPS_FN int64_t locate(const Operand<scalar_t>& o, int64_t i,
                                   Source<scalar_t>& source) {
    constexpr int64_t all = std::numeric_limits<int64_t>::max();
    if (uniform(o)) {
      source = {o.data, true};
      return all;
    }
    const int64_t j = o.repeat == 1 ? i : i / o.repeat, row = o.period == 0 ? 0 : j / o.period,
                  column = j - row * o.period;
    source = {o.data + row * o.stride + column, o.repeat > 1};
    return o.repeat > 1 ? (j + 1) * o.repeat - i : o.period == 0 ? all : o.period - column;
  }
};

// A vector's worth of elements in memory, for what is read or written less than whole.
template <class scalar_t>
struct alignas(64) Padded {
  using V = Vec<scalar_t>;
  scalar_t v[V::size()];
  FASTOPS_FN void read(const scalar_t* p, int64_t n) { V::loadu(p, n).store(v); }
  FASTOPS_FN void write(scalar_t* p, int64_t n) const { V::loadu(v).store(p, n); }
  FASTOPS_FN void fill(scalar_t value) {
    for (auto& element : v) element = value;
  }
};

// f of the j-th vectors of its operands.
template <class F, class X, size_t... k>
FASTOPS_FN auto value_of(F& f, const X& x, int j, std::index_sequence<k...>) {
  return f(x[k][j]...);
}

// out[0][i] = f(in[0][i], ...), where f takes and returns vectors, or out[m][i] = f(...).v[m] where
// there are several results. The first result may be the first operand. Every thread has an f of
// its own, and calls f.finish() in the end where there is one. Behind the end of a tensor f sees
// zeros.
template <unsigned broadcast = 0, class scalar_t, int outputs, int inputs, class F>
FASTOPS_FN void elementwise(int64_t total, const Result<scalar_t> (&out)[outputs],
                            const Operand<scalar_t> (&in)[inputs], F f) {
  using L = VecIO<scalar_t>;
  using V = typename L::V;
  Operands<scalar_t, inputs, broadcast> operands;
  Result<scalar_t> results[outputs];
  bool stream = true;
  for (int k = 0; k < inputs; ++k) operands.in[k] = in[k];
  for (int m = 0; m < outputs; ++m) {
    results[m] = out[m];
    stream = stream && streams<L>(out[m].data, total, in[0].data) && out[m].period % L::size == 0 &&
             out[m].stride % L::size == 0;
  }
  stream = stream && operands.template whole_vectors<L>();
  cpu::parallel_vectors<L::size>(total, kElementwiseGrain, [=](int64_t begin, int64_t end) {
    constexpr std::integral_constant<int64_t, L::size> full;
    auto formula = f;
    Padded<scalar_t> padded[inputs], rest[outputs];
    const auto bound = [&](int64_t i, int64_t n) {
      if constexpr (broadcast != 0)
        for (const auto& r : results)
          if (r.period != 0 && r.period - i % r.period < n) n = r.period - i % r.period;
      return n;
    };
    operands.for_each_run(
        begin, end, bound, [&](int64_t at, const Source<scalar_t>(&source)[inputs], int64_t n) {
          const scalar_t* from[inputs];
          int64_t advance[inputs];  // all ones, or 0 where one element stands for all
          for (int k = 0; k < inputs; ++k) {
            from[k] = source[k].p;
            advance[k] = -1;
            if ((broadcast >> k & 1) && source[k].uniform) {
              padded[k].fill(*source[k].p);
              from[k] = padded[k].v;
              advance[k] = 0;
            }
          }
          scalar_t* to[outputs];
          for (int m = 0; m < outputs; ++m) {
            const auto& r = results[m];
            to[m] = r.data + at;
            if constexpr (broadcast != 0)
              if (r.period != 0) to[m] = r.data + at / r.period * r.stride + at % r.period;
          }
          // The full vectors, then what is left as one more, in a buffer: so the formula is
          // compiled once, not once for each.
          int64_t whole = n / L::size * L::size;
          const int64_t left = n - whole;
          scalar_t* end_of[outputs];
          for (int m = 0; m < outputs; ++m) end_of[m] = to[m] + whole;
          for (bool last = false;; last = true) {
            for (int64_t i = 0; i < whole; i += L::size) {
              V x[inputs][L::count], y[outputs][L::count];
              for (int k = 0; k < inputs; ++k)
                L::load(from[k] + ((broadcast >> k & 1) ? i & advance[k] : i), full, x[k]);
              for (int j = 0; j < L::count; ++j) {
                const auto value = value_of(formula, x, j, std::make_index_sequence<inputs>{});
                if constexpr (outputs == 1) {
                  y[0][j] = value;
                } else {
                  for (int m = 0; m < outputs; ++m) y[m][j] = value.v[m];
                }
              }
              for (int m = 0; m < outputs; ++m) L::store(to[m] + i, full, y[m], stream);
            }
            if (last || left == 0) break;
            for (int k = 0; k < inputs; ++k) {
              if ((broadcast >> k & 1) && advance[k] == 0) continue;
              padded[k].read(from[k] + whole, left);
              from[k] = padded[k].v;
            }
            for (int m = 0; m < outputs; ++m) to[m] = rest[m].v;
            whole = L::size;
          }
          if (left)
            for (int m = 0; m < outputs; ++m) rest[m].write(end_of[m], left);
        });
    if constexpr (requires { formula.finish(); }) formula.finish();
    if (stream) fence();
  });
}

}  // namespace
}  // namespace fastops::CPU_CAPABILITY
