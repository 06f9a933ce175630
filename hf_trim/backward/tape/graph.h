// The graph behind a node → everything that its backward pass depends on but the numbers, as bytes; its saved tensors
// and leaves.
//
// e.g. a linear layer under a mean of squares: the bytes of its nodes, of what they saved (shapes, strides, dtypes; the
// exponent 2), and of the edges between them; the saved input `[4, H]`; the leaves weight and bias.

#pragma once

#include <c10/core/DispatchKeySet.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/tensor.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_hook.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

namespace hf_trim {

using at::Tensor;
using torch::autograd::Node;
using NodePtr = decltype(torch::autograd::Edge::function);
namespace compiled = torch::dynamo::autograd;

// The reason why a graph has no tape.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Leaf {
  NodePtr node;
  Tensor variable;
  Node* producer = nullptr; // the node before it that runs last
  size_t output = 0; // which of that node's outputs goes to the leaf
};

struct Graph {
  std::string key;
  std::vector<Tensor> saved;
  std::vector<Leaf> leaves;
};

template <typename T>
void append(std::string& key, const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  key.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

// Each type has a name at an address of its own.
inline void append_name(std::string& key, const Node& node) {
  append(key, typeid(node).name());
}

// The dtype that a leaf wants its gradient in, where this version of torch has such a thing.
template <typename Metadata>
auto append_grad_dtype(std::string& key, const Metadata& metadata, int) -> decltype(metadata.grad_dtype(), void()) {
  append(key, metadata.grad_dtype().value_or(at::ScalarType::Undefined));
}
template <typename Metadata>
void append_grad_dtype(std::string& /*key*/, const Metadata& /*metadata*/, long) {}

// Everything but the numbers in it that ops on a tensor may depend on.
inline void append_metadata(std::string& key, const Tensor& x) {
  auto* impl = x.unsafeGetTensorImpl();
  const auto keys = impl->key_set();
  const bool is_plain = !keys.has(c10::DispatchKey::Python) && !impl->has_symbolic_sizes_strides() &&
      !keys.has(c10::DispatchKey::FuncTorchBatched) && !keys.has(c10::DispatchKey::FuncTorchGradWrapper) &&
      x.layout() == c10::kStrided && x.has_storage();
  if (!is_plain) {
    throw Refusal("a tensor is no ordinary one");
  }
  append(key, keys.raw_repr());
  append(key, x.scalar_type());
  append(key, x.device());
  append(key, impl->is_wrapped_number());
  if (impl->is_wrapped_number()) { // a recorder gets the number itself
    append(key, x.item().toComplexDouble());
    append(key, x.scalar_type() == c10::kLong ? x.item().toLong() : 0);
  }
  append(key, x.dim());
  for (const auto size : x.sizes()) {
    append(key, size);
  }
  for (const auto stride : x.strides()) {
    append(key, stride);
  }
  if (!x.is_contiguous()) { // how much of a padded tensor's memory may be read
    append(key, x.storage_offset());
    append(key, x.storage().nbytes());
  }
}

// Tensors that are the same memory in one step must be so in the others, and so must views of one memory, of which the
// engine takes a slice once: each gets the numbers of the first of them.
struct Aliases {
  std::unordered_map<std::string, uint32_t> seen;

  void append_numbers(std::string& key, const Tensor& x) {
    std::string memory;
    append(memory, x.unsafeGetTensorImpl()->storage().unsafeGetStorageImpl());
    append(key, number(std::move(memory)));
    std::string place;
    append(place, x.const_data_ptr()); // two storages may be the same memory, of an array of NumPy say
    append(place, x.device());
    append(place, x.scalar_type());
    for (const auto size : x.sizes()) {
      append(place, size);
    }
    for (const auto stride : x.strides()) {
      append(place, stride);
    }
    append(key, number(std::move(place)));
  }

  uint32_t number(std::string&& what) {
    return seen.try_emplace(std::move(what), static_cast<uint32_t>(seen.size())).first->second;
  }
};

inline bool starts_with(const char* text, const char* start) {
  return std::strncmp(text, start, std::strlen(start)) == 0;
}

// Whether a node's formula is ATen's own: it is a function of what the node saved, which `compiled_args` lists.
inline bool is_aten(const Node& node) {
  const char* name = typeid(node).name();
  return starts_with(name, "N5torch8autograd9generated") || std::strcmp(name, "N5torch8autograd10CopySlicesE") == 0 ||
      std::strcmp(name, "N5torch8autograd13CopyBackwardsE") == 0;
}

inline bool is_leaf(const Node& node) {
  return std::strcmp(typeid(node).name(), "N5torch8autograd14AccumulateGradE") == 0;
}

// Whether the backward pass under way runs all of the graph, and hands out nothing but gradients of leaves.
inline void check_task(const std::vector<NodePtr>& nodes) {
  if (torch::autograd::get_current_graph_task_keep_graph()) {
    throw Refusal("the graph is kept");
  }
  const auto* infos = torch::autograd::get_current_graph_task_exec_info();
  if (infos == nullptr || infos->empty()) {
    return;
  }
  for (const auto& node : nodes) {
    const auto info = infos->find(node.get());
    const bool runs = info != infos->end() && info->second.should_execute();
    if (!runs || (info->second.captures_ != nullptr && !is_leaf(*node))) {
      throw Refusal("only some gradients are asked for");
    }
  }
}

// Whether a node has no hook but that one of Python's which starts the tape.
inline bool has_one_hook(const Node& node) {
  if (node.pre_hooks().size() != 1 || !node.post_hooks().empty()) {
    return false;
  }
  const auto& hooks = *node.pre_hooks()[0];
  return std::strcmp(typeid(hooks).name(), "N5torch8autograd17PyFunctionPreHookE") == 0 &&
      PyDict_Size(static_cast<const torch::autograd::PyFunctionPreHook&>(hooks).dict) == 1;
}

// `inputs` are what the tape is given beside the graph.
inline std::unique_ptr<Graph> walk(const NodePtr& root, const std::vector<Tensor>& inputs) {
  auto graph = std::make_unique<Graph>();
  auto& key = graph->key;
  compiled::AutogradCompilerCall compiler(compiled::SizeInput::STATIC);
  auto& calls = compiler.node_calls;
  std::vector<NodePtr> nodes{root};
  std::unordered_map<Node*, size_t> leaf_numbers;
  std::vector<std::pair<uint64_t, uint32_t>> sequence;
  const auto stream = root->stream();
  calls.lookup(root);
  for (size_t i = 0; i < nodes.size(); ++i) { // grows on the way
    const NodePtr node = nodes[i];
    if (!node->tensor_pre_hooks().empty() || !node->retains_grad_hooks().empty()) {
      throw Refusal("a tensor has a hook");
    }
    if (node->device() != root->device() || node->stream() != stream) {
      throw Refusal("there are several devices or streams");
    }
    append_name(key, *node);
    if (is_leaf(*node)) {
      append_metadata(key, graph->leaves[leaf_numbers.at(node.get())].variable);
      append_grad_dtype(key, node->input_metadata(0), 0);
      continue;
    }
    if (!is_aten(*node)) {
      throw Refusal(node->name() + " is not an ATen op");
    }
    if (node == root ? !has_one_hook(*node) : !node->pre_hooks().empty() || !node->post_hooks().empty()) {
      throw Refusal("a node has a hook");
    }
    if (const auto* write = dynamic_cast<const torch::autograd::CopySlices*>(node.get())) {
      if (write->fn == nullptr || !is_aten(*write->fn)) { // what has written, whose formula it runs
        throw Refusal("something else than an ATen op has written to a view");
      }
      append_name(key, *write->fn);
    }
    sequence.emplace_back(node->sequence_nr(), i);
    for (size_t output = 0; output < node->num_outputs(); ++output) {
      const auto& edge = node->next_edge(output);
      if (!edge.is_valid()) {
        continue;
      }
      if (calls.find(edge.function.get()) == calls.end()) {
        calls.lookup(edge.function);
        nodes.push_back(edge.function);
      }
      if (is_leaf(*edge.function)) {
        const auto [it, is_new] = leaf_numbers.try_emplace(edge.function.get(), graph->leaves.size());
        if (is_new) {
          const auto& accumulate = static_cast<const torch::autograd::AccumulateGrad&>(*edge.function);
          graph->leaves.push_back({edge.function, accumulate.variable, nullptr, 0});
        }
        auto& leaf = graph->leaves[it->second];
        if (leaf.producer == nullptr || node->sequence_nr() < leaf.producer->sequence_nr()) {
          leaf.producer = node.get();
          leaf.output = output;
        }
      }
    }
    auto& call = calls.lookup(node);
    compiled::CompiledNodeArgs args(compiler, call);
    if (node != root) { // whose hook is known
      args.collect(call);
    }
    args.collect(node->next_edges());
    for (uint32_t input = 0; input < node->num_inputs(); ++input) {
      args.collect(node->input_metadata(input));
    }
    node->compiled_args(args);
    // Looked at for each node, so that it is soon known of a model with checkpoints.
    if (!compiler.packed_inputs.empty() || !compiler.hooks.empty() || !compiler.lifted_ivalue_args.args.empty()) {
      throw Refusal("saved tensors have hooks");
    }
    const auto collected = args.key();
    append(key, collected.key_size);
    key.append(reinterpret_cast<const char*>(collected.key), collected.key_size);
  }
  check_task(nodes);
  for (const auto& size : compiler.all_size_inputs) {
    append(key, size.value);
  }
  Aliases aliases;
  for (const auto& x : inputs) {
    aliases.append_numbers(key, x);
  }
  for (const auto& x : compiler.tensor_args.inputs) {
    append_metadata(key, x);
    aliases.append_numbers(key, x);
  }
  // Autograd runs nodes by their age: which of two gradients is added to the other depends on it.
  std::sort(sequence.begin(), sequence.end());
  for (const auto& [_, number] : sequence) {
    append(key, number);
  }
  graph->saved = std::move(compiler.tensor_args.inputs);
  return graph;
}

} // namespace hf_trim
