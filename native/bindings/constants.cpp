// Numbers and orders that Python must know, too: torchlamp.kernels.constants defines them for the references.
#include <array>
#include <utility>

#include "bindings/module.hpp"

namespace lamp::python {
namespace {

// The names of an enumeration in the order of its values, which count from 0.
template <class Enum, std::size_t Count>
nb::tuple in_order(const std::pair<Enum, const char*> (&names)[Count]) {
  std::array<const char*, Count> ordered{};
  for (const auto& [value, name] : names) ordered.at(static_cast<std::size_t>(value)) = name;
  nb::list list;
  for (const char* name : ordered) list.append(nb::str(name));
  return nb::tuple(list);
}

}  // namespace

void bind_constants(nb::module_& m) {
  nb::dict constants, largest;
  constants["overflows"] = in_order<Overflow>(
      {{Overflow::inf, "inf"}, {Overflow::nan, "nan"}, {Overflow::saturate, "saturate"}});
  constants["rule_weights"] = in_order<RuleWeight>({{RuleWeight::strict, "strict"},
                                                    {RuleWeight::relaxed, "relaxed"},
                                                    {RuleWeight::running, "running"},
                                                    {RuleWeight::topz, "topz"},
                                                    {RuleWeight::bridge, "bridge"},
                                                    {RuleWeight::running_residual, "running-residual"},
                                                    {RuleWeight::bridge_residual, "bridge-residual"}});
  constants["activations"] =
      in_order<Activation>({{Activation::silu, "silu"}, {Activation::gelu_tanh, "gelu_tanh"}});
  constants["block_keys"] = static_cast<int>(kBlockKeys);
  constants["block_visible"] = static_cast<int>(block_visible);
  constants["block_touched"] = static_cast<int>(block_touched);
  constants["rows"] = kPackRows;
  constants["group"] = kPackGroup;
  for (int bits = 1; bits <= 16; ++bits)
    if (BlockFormats::has(bits)) largest[nb::int_(bits)] = BlockFormats::largest(bits);
  constants["largest_code"] = largest;
  constants["largest_short"] = kLargestShort;
  constants["surprise"] = kSurprise;
  constants["vanished"] = kVanished;
  constants["skip"] = kSkip;
  constants["append_overflow"] = static_cast<int>(append_overflow);
  constants["append_nonfinite_values"] = static_cast<int>(append_nonfinite_values);
  m.attr("CONSTANTS") = constants;
}

}  // namespace lamp::python
