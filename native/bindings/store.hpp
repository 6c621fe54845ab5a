// Python's object for a layer's keys and values: it holds the arrays, so that a call passes only what is new.
#pragma once

#include "memory.hpp"
#include "bindings/module.hpp"

namespace lamp::python {

using Bytes = Array<std::uint8_t, 1>;
using Halves = Array<std::uint16_t, 1>;
using Full4 = nb::ndarray<nb::ndim<4>, nb::device::cpu>;
using Counts = Array<std::int32_t, 3>;

class KeyValueStore {
 public:
  // full_keys (batch, key heads, capacity, size), full_values likewise: both float32 or both float16; the low-bit arrays
  // as lowbit/store_spec.hpp has them; mean (batch * key heads * size,) or None.
  KeyValueStore(std::string isa, Bytes key_codes, Halves key_scales, Array<float, 1> key_errors, Bytes value_codes,
                Halves value_scales, Full4 full_keys, Full4 full_values, std::optional<Floats<1>> mean, int key_bits,
                int value_bits, bool rotated)
      : kernels_(kernels(isa)), key_codes_(key_codes), key_scales_(key_scales), key_errors_(key_errors),
        value_codes_(value_codes), value_scales_(value_scales), full_keys_(full_keys), full_values_(full_values),
        mean_(mean) {
    require(BlockFormats::has(key_bits), "no low-bit format of keys has so many bits");
    require(RowPairFormats::has(value_bits), "no low-bit format of values has so many bits");
    KeyValues& s = store_;
    s.batches = length(full_keys.shape(0));
    s.heads = length(full_keys.shape(1));
    s.capacity = length(full_keys.shape(2));
    s.size = length(full_keys.shape(3));
    s.value_size = length(full_values.shape(3));
    const nb::dlpack::dtype float16{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
    const bool half = full_keys.dtype() == float16, single = full_keys.dtype() == nb::dtype<float>();
    require((half || single) && full_values.dtype() == full_keys.dtype() && row_major(full_keys) &&
                row_major(full_values) && full_values.shape(0) == full_keys.shape(0) &&
                full_values.shape(1) == full_keys.shape(1) && full_values.shape(2) == full_keys.shape(2),
            "full copies must be contiguous, float32 or float16, of shape (batch, heads, capacity, size)");
    require(s.capacity % kPackRows == 0 && s.size > 0 && s.value_size > 0,
            "the capacity must be a multiple of 16, and sizes positive");
    require(!rotated || (s.size & (s.size - 1)) == 0, "only keys whose size is a power of two can be rotated");
    const FullType type = half ? FullType::float16 : FullType::float32;
    s.full_keys = {full_keys.data(), type, s.size};
    s.full_values = {full_values.data(), type, s.value_size};
    s.keys = {key_codes.data(), key_scales.data(), key_errors.data(), key_bits, groups(s.size)};
    s.values = {value_codes.data(), value_scales.data(), value_bits, groups(s.value_size)};
    s.rotated = rotated;
    const std::ptrdiff_t heads = s.batches * s.heads, rows = heads * s.capacity, blocks = rows / kPackRows;
    require(row_major(key_codes) && row_major(key_scales) && row_major(key_errors) && row_major(value_codes) &&
                row_major(value_scales) && length(key_codes.size()) == blocks * s.keys.block_codes() &&
                length(key_scales.size()) == blocks * s.keys.block_scales() && length(key_errors.size()) == rows &&
                length(value_codes.size()) == rows / 2 * s.values.pair_codes() &&
                length(value_scales.size()) == rows * s.values.groups,
            "the low-bit arrays must be contiguous and of the store's size");
    if (mean) {
      require(row_major(*mean) && length(mean->size()) == heads * s.size, "the mean must have size heads * size");
      s.mean = mean->data();
    }
    prefer_large_pages(key_codes.data(), key_codes.size());
    prefer_large_pages(value_codes.data(), value_codes.size());
    prefer_large_pages(full_keys.data(), full_keys.nbytes());
    prefer_large_pages(full_values.data(), full_values.nbytes());
  }

  // Returns bits of AppendFlag.
  int append(Floats<4> k, Floats<4> v, std::ptrdiff_t start, int threads) {
    Append p;
    p.store = store_;
    p.start = start;
    p.count = length(k.shape(2));
    p.threads = threads;
    const auto fits = [&](const Floats<4>& x, std::ptrdiff_t size) {
      return length(x.shape(0)) == store_.batches && length(x.shape(1)) == store_.heads &&
             length(x.shape(2)) == p.count && length(x.shape(3)) == size && (size == 1 || x.stride(3) == 1);
    };
    require(fits(k, store_.size) && fits(v, store_.value_size),
            "new keys and values must have shape (batch, heads, count, size) and contiguous elements");
    require(start >= 0 && start + p.count <= store_.capacity, "new keys exceed the capacity");
    p.k = k.data();
    p.k_batch = k.stride(0);
    p.k_head = k.stride(1);
    p.k_row = k.stride(2);
    p.v = v.data();
    p.v_batch = v.stride(0);
    p.v_head = v.stride(1);
    p.v_row = v.stride(2);
    const nb::gil_scoped_release release;
    kernels_.decode.append(p);
    return p.flags;
  }

  void attend(Floats<4> q, Array<float, 4> out, Counts recomputed, Counts full_rows, Array<std::int32_t, 2> visible,
              std::ptrdiff_t first, std::ptrdiff_t last, std::optional<Array<const std::uint8_t, 3>> mask, bool causal,
              std::optional<Floats<1>> sinks, float scaling, float softcap, float scores_threshold,
              float values_threshold, bool nonfinite_values, int threads) const {
    Attend p;
    p.store = store_;
    p.first = first;
    p.last = last;
    p.heads = length(q.shape(1));
    p.queries = length(q.shape(2));
    require(length(q.shape(0)) == store_.batches && p.heads % store_.heads == 0 &&
                length(q.shape(3)) == store_.size && (store_.size == 1 || q.stride(3) == 1),
            "queries must have shape (batch, heads, count, size), heads a multiple of the store's, contiguous elements");
    require(0 <= first && first <= last && last <= store_.capacity, "positions must lie within the capacity");
    require(row_major(out) && length(out.shape(0)) == store_.batches && length(out.shape(1)) == p.queries &&
                length(out.shape(2)) == p.heads && length(out.shape(3)) == store_.value_size,
            "out must be contiguous, of shape (batch, queries, heads, value size)");
    const auto counts = [&](const Counts& x, std::ptrdiff_t heads) {
      return row_major(x) && length(x.shape(0)) == store_.batches && length(x.shape(1)) == heads &&
             length(x.shape(2)) == p.queries;
    };
    require(counts(recomputed, p.heads) && counts(full_rows, store_.heads) && row_major(visible) &&
                length(visible.shape(0)) == store_.batches && length(visible.shape(1)) == p.queries,
            "counts must be contiguous, of shapes (batch, heads, queries), (batch, key heads, queries), (batch, queries)");
    if (mask) {
      require(length(mask->shape(0)) == store_.batches && length(mask->shape(1)) == p.queries &&
                  length(mask->shape(2)) == last - first && (last - first <= 1 || mask->stride(2) == 1),
              "mask must have shape (batch, queries, keys) and contiguous keys");
      p.mask = mask->data();
      p.mask_batch = mask->stride(0);
      p.mask_row = mask->stride(1);
    }
    if (sinks) {
      require(row_major(*sinks) && length(sinks->size()) == p.heads, "sinks must be contiguous, of shape (heads,)");
      p.sinks = sinks->data();
    }
    p.q = q.data();
    p.q_batch = q.stride(0);
    p.q_head = q.stride(1);
    p.q_row = q.stride(2);
    p.out = out.data();
    p.recomputed = recomputed.data();
    p.full_rows = full_rows.data();
    p.visible = visible.data();
    p.causal = causal;
    p.scaling = scaling;
    p.softcap = softcap;
    p.nonfinite_values = nonfinite_values;
    p.threads = threads;
    p.scores_threshold = scores_threshold;
    p.values_threshold = values_threshold;
    const nb::gil_scoped_release release;
    kernels_.decode.attend(p);
  }

  const KeyValues& store() const { return store_; }

 private:
  static std::ptrdiff_t groups(std::ptrdiff_t columns) { return (columns + kPackGroup - 1) / kPackGroup; }

  const Kernels& kernels_;
  Bytes key_codes_;
  Halves key_scales_;
  Array<float, 1> key_errors_;
  Bytes value_codes_;
  Halves value_scales_;
  Full4 full_keys_, full_values_;
  std::optional<Floats<1>> mean_;
  KeyValues store_;
};

}  // namespace lamp::python
