// The Python face of a whole decoder layer.
#include <numeric>
#include <vector>

#include "bindings/lowbit.hpp"

namespace lamp::python {
namespace {

using OptionalVector = std::optional<Vector>;

// A decoder layer; keys and values are in a store of their own.
class Layer {
 public:
  Layer(std::string isa, const BlockMatrix& qkv, const BlockMatrix& out, const Mlp& mlp, Vector attention_norm,
        OptionalVector after_attention, Vector mlp_norm, OptionalVector after_mlp, OptionalVector query_norm, OptionalVector key_norm, float eps,
        OptionalVector qkv_bias, OptionalVector out_bias, std::ptrdiff_t heads, std::ptrdiff_t kv_heads, std::ptrdiff_t head_size,
        float up_threshold, float down_threshold)
      : kernels_(kernels(isa)),
        kept_{attention_norm, after_attention, mlp_norm, after_mlp, query_norm, key_norm, qkv_bias, out_bias} {
    call_.mlp = mlp.call();
    call_.mlp.up_threshold = up_threshold;
    call_.mlp.down_threshold = down_threshold;
    call_.qkv = qkv.blocks();
    call_.out = out.blocks();
    call_.hidden = qkv.columns();
    call_.heads = heads;
    call_.kv_heads = kv_heads;
    call_.head_size = head_size;
    require(heads > 0 && kv_heads > 0 && head_size > 0 && head_size % 2 == 0, "heads need an even size");
    require(qkv.rows() == (heads + 2 * kv_heads) * head_size && out.columns() == heads * head_size &&
                out.rows() == call_.hidden && call_.mlp.columns == call_.hidden && call_.mlp.outputs == call_.hidden,
            "the matrices do not fit together");
    const auto norm = [&](const OptionalVector& weight, std::ptrdiff_t size) {
      return RmsNorm{vector(weight, size), eps};
    };
    call_.attention_norm = norm(kept_[0], call_.hidden);
    call_.after_attention = norm(kept_[1], call_.hidden);
    call_.mlp_norm = norm(kept_[2], call_.hidden);
    call_.after_mlp = norm(kept_[3], call_.hidden);
    call_.query_norm = norm(kept_[4], head_size);
    call_.key_norm = norm(kept_[5], head_size);
    call_.qkv_bias = vector(kept_[6], qkv.rows());
    call_.out_bias = vector(kept_[7], call_.hidden);
  }

  // Some tokens of each sequence through the whole layer: their keys and values go to positions `start`, ... of the
  // store. x and y (tokens, hidden), those of the first sequence first; mask (batch, tokens of a sequence, keys). Returns
  // scores recomputed, values read in full, keys seen, neurons recomputed, columns of down read in full, and what
  // `KeyValueStore.append` returns.
  std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, int> step(
      Floats<2> x, Floats<2> cosines, Floats<2> sines, const KeyValueStore& keys_values, std::ptrdiff_t start,
      std::ptrdiff_t first, std::optional<Array<const std::uint8_t, 3>> mask, float scaling, float scores_threshold,
      float values_threshold, bool nonfinite_values, Array<float, 2> y, int threads) const {
    LowBitLayer p = call_;
    const KeyValues& store = keys_values.store();
    const std::ptrdiff_t batch = store.batches, size = p.head_size, keys = p.kv_heads * size;
    set_tokens(p, x, threads);
    set_angles(p, cosines, sines);
    set_output(p, y);
    require(p.tokens % batch == 0 && store.heads == p.kv_heads && store.size == size && store.value_size == size,
            "the store must be of the layer's batch, heads and size");
    const std::ptrdiff_t count = p.tokens / batch;
    require(0 <= first && first <= start && start + count <= store.capacity,
            "the new positions must lie within the capacity");
    if (mask)
      require(length(mask->shape(0)) == batch && length(mask->shape(1)) == count &&
                  length(mask->shape(2)) == start + count - first && (mask->shape(2) <= 1 || mask->stride(2) == 1),
              "mask must have shape (batch, tokens of a sequence, keys) and contiguous keys");
    thread_local std::vector<float> numbers;
    thread_local std::vector<std::int32_t> counts;
    numbers.resize(static_cast<std::size_t>(p.tokens * (2 * p.heads * size + 2 * keys)));
    counts.assign(static_cast<std::size_t>(p.tokens * (p.heads + p.kv_heads + 1)), 0);
    p.q = numbers.data();
    p.k = p.q + p.tokens * p.heads * size;
    p.v = p.k + p.tokens * keys;
    float* attended = p.v + p.tokens * keys;
    p.attended = attended;
    std::int64_t selected[2] = {0, 0};
    p.mlp.selected = selected;

    Append append = append_step(p, store, start, count);
    Attend attend = attend_step(p, store, first, start + count, count);
    attend.out = attended;
    attend.causal = count > 1 && !mask;
    if (mask) {
      attend.mask = mask->data();
      attend.mask_batch = mask->stride(0);
      attend.mask_row = mask->stride(1);
    }
    attend.scaling = scaling;
    attend.scores_threshold = scores_threshold;
    attend.values_threshold = values_threshold;
    attend.recomputed = counts.data();
    attend.full_rows = attend.recomputed + p.tokens * p.heads;
    attend.visible = attend.full_rows + p.tokens * p.kv_heads;
    {
      const nb::gil_scoped_release release;
      kernels_.lowbit.layer_begin(p);
      kernels_.decode.append(append);
      attend.nonfinite_values = nonfinite_values || (append.flags & append_nonfinite_values);
      kernels_.decode.attend(attend);
      kernels_.lowbit.layer_end(p);
    }
    const auto total = [](const std::int32_t* from, std::ptrdiff_t n) {
      return std::accumulate(from, from + n, std::int64_t{0});
    };
    return {total(attend.recomputed, p.tokens * p.heads), total(attend.full_rows, p.tokens * p.kv_heads),
            total(attend.visible, p.tokens), selected[0], selected[1], append.flags};
  }

  // What comes before the attention: queries (tokens, heads, size), keys and values (tokens, key heads, size) of tokens
  // x (tokens, hidden).
  void begin(Floats<2> x, Floats<2> cosines, Floats<2> sines, Array<float, 3> q, Array<float, 3> k, Array<float, 3> v,
             int threads) const {
    LowBitLayer p = call_;
    set_tokens(p, x, threads);
    set_angles(p, cosines, sines);
    const auto fits = [&](const Array<float, 3>& a, std::ptrdiff_t heads) {
      return row_major(a) && length(a.shape(0)) == p.tokens && length(a.shape(1)) == heads &&
             length(a.shape(2)) == p.head_size;
    };
    require(fits(q, p.heads) && fits(k, p.kv_heads) && fits(v, p.kv_heads),
            "q, k and v must be contiguous, of shape (tokens, heads, size)");
    p.q = q.data();
    p.k = k.data();
    p.v = v.data();
    const nb::gil_scoped_release release;
    kernels_.lowbit.layer_begin(p);
  }

  // What comes after it: y (tokens, hidden) from the layer's input x and the attention's output (tokens, heads * size).
  // Returns neurons recomputed and columns of down read in full.
  std::tuple<std::int64_t, std::int64_t> end(Floats<2> x, Floats<2> attended, Array<float, 2> y, int threads) const {
    LowBitLayer p = call_;
    set_tokens(p, x, threads);
    set_output(p, y);
    require(row_major(attended) && length(attended.shape(0)) == p.tokens &&
                length(attended.shape(1)) == p.heads * p.head_size,
            "attended must be contiguous, of shape (tokens, heads * size)");
    std::int64_t selected[2] = {0, 0};
    p.attended = attended.data();
    p.mlp.selected = selected;
    {
      const nb::gil_scoped_release release;
      kernels_.lowbit.layer_end(p);
    }
    return {selected[0], selected[1]};
  }

 private:
  static void set_tokens(LowBitLayer& p, const Floats<2>& x, int threads) {
    require(row_major(x) && length(x.shape(1)) == p.hidden, "x must be contiguous, of shape (tokens, hidden)");
    p.x = x.data();
    p.tokens = length(x.shape(0));
    p.threads = threads;
  }

  static void set_angles(LowBitLayer& p, const Floats<2>& cosines, const Floats<2>& sines) {
    p.angles = length(cosines.shape(0));
    require(length(cosines.shape(1)) == p.head_size && length(sines.shape(1)) == p.head_size && row_major(cosines) &&
                row_major(sines) && cosines.shape(0) == sines.shape(0) && p.angles > 0 && p.tokens % p.angles == 0,
            "cosines and sines must be contiguous, of shape (tokens or those of a sequence, head size)");
    p.cosines = cosines.data();
    p.sines = sines.data();
  }

  static void set_output(LowBitLayer& p, const Array<float, 2>& y) {
    require(row_major(y) && length(y.shape(0)) == p.tokens && length(y.shape(1)) == p.hidden,
            "y must be contiguous, of shape (tokens, hidden)");
    p.y = y.data();
  }

  // The new keys and values of a step, to positions `start`, ...
  static Append append_step(const LowBitLayer& p, const KeyValues& store, std::ptrdiff_t start, std::ptrdiff_t count) {
    Append append;
    append.store = store;
    append.k = p.k;
    append.v = p.v;
    append.start = start;
    append.count = count;
    append.k_row = append.v_row = p.kv_heads * p.head_size;
    append.k_batch = append.v_batch = count * append.k_row;
    append.k_head = append.v_head = p.head_size;
    append.threads = p.threads;
    return append;
  }

  // The queries of a step over positions [first, last).
  static Attend attend_step(const LowBitLayer& p, const KeyValues& store, std::ptrdiff_t first, std::ptrdiff_t last,
                            std::ptrdiff_t count) {
    Attend attend;
    attend.store = store;
    attend.first = first;
    attend.last = last;
    attend.q = p.q;
    attend.q_row = p.heads * p.head_size;
    attend.q_batch = count * attend.q_row;
    attend.q_head = p.head_size;
    attend.heads = p.heads;
    attend.queries = count;
    attend.threads = p.threads;
    return attend;
  }

  static float* vector(const OptionalVector& weight, std::ptrdiff_t size) {
    if (!weight) return nullptr;
    require(row_major(*weight) && length(weight->size()) == size, "a norm or bias must be contiguous and fit");
    return weight->data();
  }

  const Kernels& kernels_;
  OptionalVector kept_[8];
  LowBitLayer call_;
};

void rms_norm(const std::string& isa, Floats<2> x, Vector weight, float eps, Array<float, 2> y) {
  const std::ptrdiff_t size = length(weight.size());
  require(row_major(x) && row_major(weight) && length(x.shape(1)) == size,
          "x must be contiguous, of shape (vectors, size), and weight of that size");
  require(row_major(y) && y.shape(0) == x.shape(0) && y.shape(1) == x.shape(1), "y must be contiguous, of x's shape");
  const Kernels& k = kernels(isa);
  const nb::gil_scoped_release release;
  k.lowbit.rms_norm({weight.data(), eps}, x.data(), length(x.shape(0)), size, y.data());
}

}  // namespace

void bind_layer(nb::module_& m) {
  m.def("rms_norm", &rms_norm, "isa"_a, "x"_a, "weight"_a, "eps"_a, "y"_a);
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<std::string, const BlockMatrix&, const BlockMatrix&, const Mlp&, Vector, OptionalVector, Vector,
                    OptionalVector, OptionalVector, OptionalVector, float, OptionalVector, OptionalVector,
                    std::ptrdiff_t, std::ptrdiff_t, std::ptrdiff_t, float, float>(),
           "isa"_a, "qkv"_a, "out"_a, "mlp"_a, "attention_norm"_a, "after_attention"_a.none(), "mlp_norm"_a,
           "after_mlp"_a.none(), "query_norm"_a.none(), "key_norm"_a.none(), "eps"_a, "qkv_bias"_a.none(),
           "out_bias"_a.none(), "heads"_a, "kv_heads"_a, "head_size"_a, "up_threshold"_a, "down_threshold"_a,
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
      .def("step", &Layer::step, "x"_a, "cosines"_a, "sines"_a, "store"_a, "start"_a, "first"_a, "mask"_a.none(),
           "scaling"_a, "scores_threshold"_a, "values_threshold"_a, "nonfinite_values"_a, "y"_a, "threads"_a)
      .def("begin", &Layer::begin, "x"_a, "cosines"_a, "sines"_a, "q"_a, "k"_a, "v"_a, "threads"_a)
      .def("end", &Layer::end, "x"_a, "attended"_a, "y"_a, "threads"_a);
}

}  // namespace lamp::python
