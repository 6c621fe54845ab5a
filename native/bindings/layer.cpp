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

  // One token of each sequence through the whole layer: its key and value go to position `start` of the store. Returns
  // scores recomputed, values read in full, keys seen, neurons recomputed, columns of down read in full, and what
  // `KeyValueStore.append` returns.
  std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, int> step(
      Floats<2> x, Floats<2> cosines, Floats<2> sines, const KeyValueStore& keys_values, std::ptrdiff_t start,
      std::ptrdiff_t first, std::optional<Array<const std::uint8_t, 2>> mask, float scaling, float scores_threshold,
      float values_threshold, bool nonfinite_values, Array<float, 2> y, int threads) const {
    LowBitLayer p = call_;
    const KeyValues& store = keys_values.store();
    const std::ptrdiff_t batch = length(x.shape(0)), size = p.head_size, keys = p.kv_heads * size;
    p.batch = batch;
    p.threads = threads;
    check_step(x, y, cosines, sines, store, start, first);
    if (mask)
      require(length(mask->shape(0)) == batch && length(mask->shape(1)) == start + 1 - first &&
                  (start == first || mask->stride(1) == 1),
              "mask must have shape (batch, keys) and contiguous keys");
    thread_local std::vector<float> numbers;
    thread_local std::vector<std::int32_t> counts;
    numbers.resize(static_cast<std::size_t>(batch * (2 * p.heads * size + 2 * keys)));
    counts.assign(static_cast<std::size_t>(batch * (p.heads + p.kv_heads + 1)), 0);
    p.x = x.data();
    p.y = y.data();
    p.q = numbers.data();
    p.k = p.q + batch * p.heads * size;
    p.v = p.k + batch * keys;
    float* attended = p.v + batch * keys;
    p.attended = attended;
    p.cosines = cosines.data();
    p.sines = sines.data();
    p.angle_stride = cosines.shape(0) == 1 ? 0 : size;
    std::int64_t selected[2] = {0, 0};
    p.mlp.selected = selected;

    Append append = append_step(p, store, start);
    Attend attend = attend_step(p, store, first, start + 1);
    attend.out = attended;
    if (mask) {
      attend.mask = mask->data();
      attend.mask_batch = mask->stride(0);
    }
    attend.scaling = scaling;
    attend.scores_threshold = scores_threshold;
    attend.values_threshold = values_threshold;
    attend.recomputed = counts.data();
    attend.full_rows = attend.recomputed + batch * p.heads;
    attend.visible = attend.full_rows + batch * p.kv_heads;
    {
      const nb::gil_scoped_release release;
      kernels_.lowbit.layer_begin(p);
      kernels_.decode.append(append);
      attend.nonfinite_values = nonfinite_values || (append.flags & append_nonfinite_values);
      kernels_.decode.attend(attend);
      kernels_.lowbit.layer_end(p);
    }
    const auto total = [](const std::int32_t* from, std::ptrdiff_t count) {
      return std::accumulate(from, from + count, std::int64_t{0});
    };
    return {total(attend.recomputed, batch * p.heads), total(attend.full_rows, batch * p.kv_heads),
            total(attend.visible, batch), selected[0], selected[1], append.flags};
  }

 private:
  void check_step(const Floats<2>& x, const Array<float, 2>& y, const Floats<2>& cosines, const Floats<2>& sines,
                  const KeyValues& store, std::ptrdiff_t start, std::ptrdiff_t first) const {
    const std::ptrdiff_t batch = length(x.shape(0)), size = call_.head_size;
    require(row_major(x) && length(x.shape(1)) == call_.hidden, "x must be contiguous, of shape (batch, hidden)");
    require(row_major(y) && y.shape(0) == x.shape(0) && length(y.shape(1)) == call_.hidden,
            "y must be contiguous, of shape (batch, hidden)");
    require(length(cosines.shape(1)) == size && length(sines.shape(1)) == size && row_major(cosines) &&
                row_major(sines) && cosines.shape(0) == sines.shape(0) &&
                (cosines.shape(0) == 1 || length(cosines.shape(0)) == batch),
            "cosines and sines must be contiguous, of shape (batch or 1, head size)");
    require(store.batches == batch && store.heads == call_.kv_heads && store.size == size && store.value_size == size,
            "the store must be of the layer's batch, heads and size");
    require(0 <= first && first <= start && start < store.capacity, "the new position must lie within the capacity");
  }

  // The new keys and values of a step, to position `start`.
  static Append append_step(const LowBitLayer& p, const KeyValues& store, std::ptrdiff_t start) {
    Append append;
    append.store = store;
    append.k = p.k;
    append.v = p.v;
    append.start = start;
    append.count = 1;
    append.k_batch = append.v_batch = p.kv_heads * p.head_size;
    append.k_head = append.v_head = append.k_row = append.v_row = p.head_size;
    append.threads = p.threads;
    return append;
  }

  // The queries of a step over positions [first, last).
  static Attend attend_step(const LowBitLayer& p, const KeyValues& store, std::ptrdiff_t first, std::ptrdiff_t last) {
    Attend attend;
    attend.store = store;
    attend.first = first;
    attend.last = last;
    attend.q = p.q;
    attend.q_batch = p.heads * p.head_size;
    attend.q_head = attend.q_row = p.head_size;
    attend.heads = p.heads;
    attend.queries = 1;
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
           "scaling"_a, "scores_threshold"_a, "values_threshold"_a, "nonfinite_values"_a, "y"_a, "threads"_a);
}

}  // namespace lamp::python
