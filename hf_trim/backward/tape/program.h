// A list of ATen ops on numbered registers, and one run of it on the saved tensors of one graph.
//
// e.g. the ops `index_select`, `mm` and `sum` of a linear layer: the hook of its node runs them when autograd gets there,
// and puts the gradients in the place of those that the node returns, which are undefined.

#pragma once

#include "graph.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function_hook.h>

#include <memory>
#include <utility>

namespace hf_trim {

using c10::IValue;
using torch::autograd::variable_list;

// Integers, of which some are so many for each kept row.
struct Integers {
  std::vector<int64_t> fixed, per_row;

  int64_t at(size_t i, int64_t count) const {
    return fixed[i] + per_row[i] * count;
  }
};

struct Op {
  c10::OperatorHandle handle;
  std::vector<IValue> arguments; // those that are registers or depend on the number of kept rows are filled in at each run
  std::vector<std::pair<size_t, int>> tensors; // argument, register
  struct List {
    size_t argument;
    std::vector<int> registers; // −1 for none
    bool is_optional;
  };
  std::vector<List> lists;
  struct Counted {
    size_t argument;
    Integers numbers;
    bool is_list;
  };
  std::vector<Counted> counted;
  std::vector<std::vector<int>> results; // for each result the registers of its tensors; −1 where nobody needs them
  std::vector<int> frees; // registers that are not needed any more
  // For each result the number that it must be, or the sizes of its tensors; empty if it may be any.
  std::vector<IValue> numbers;
  std::vector<std::vector<Integers>> sizes;
};

struct Result { // of a leaf
  int place; // its register; −1 if it has no gradient
  size_t end; // number of ops after which it is there
};

struct Program {
  std::vector<Op> ops;
  size_t num_registers = 0, num_inputs = 0, num_first = 0; // ops that lead to numbers which must be the same
  std::vector<std::pair<size_t, int>> saved; // number of the saved tensor, its register
  std::vector<Result> results;
};

// One run of a program, on the saved tensors of one graph.
struct Run {
  std::shared_ptr<const Program> program;
  int64_t count; // of kept rows
  std::vector<Tensor> registers;
  std::vector<int64_t> versions; // of saved tensors, by register; −1 for other registers
  size_t next = 0;

  Run(std::shared_ptr<const Program> of, const Graph& graph, std::vector<Tensor> inputs, int64_t num_rows)
      : program(std::move(of)), count(num_rows) {
    registers = std::move(inputs);
    registers.resize(program->num_registers);
    versions.resize(program->num_registers, -1);
    for (const auto& [number, place] : program->saved) {
      registers[place] = graph.saved.at(number);
      versions[place] = registers[place]._version();
    }
  }

  // Whether the tape holds for the numbers of this step. No gradient is handed out before that is known.
  bool begin() {
    return advance(program->num_first);
  }

  bool advance(size_t end) {
    if (next >= end) {
      return true;
    }
    // Ops were recorded below autograd and autocast.
    const c10::impl::ExcludeDispatchKeyGuard below(
        c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset);
    torch::jit::Stack stack;
    for (; next < end; ++next) {
      const auto& op = program->ops[next];
      stack.assign(op.arguments.begin(), op.arguments.end());
      for (const auto& [argument, place] : op.tensors) {
        stack[argument] = read(place);
      }
      for (const auto& list : op.lists) {
        stack[list.argument] = tensors(list);
      }
      for (const auto& counted : op.counted) {
        stack[counted.argument] = integers(counted);
      }
      op.handle.callBoxed(stack);
      if (!is_expected(op, stack)) {
        return false;
      }
      for (size_t i = 0; i < op.results.size(); ++i) {
        const auto& places = op.results[i];
        if (stack[i].isTensor()) {
          if (places[0] >= 0) {
            registers[places[0]] = std::move(stack[i]).toTensor();
          }
        } else if (stack[i].isTensorList()) {
          const auto list = stack[i].toTensorVector();
          TORCH_CHECK(list.size() == places.size(), "an op returned another number of tensors");
          for (size_t j = 0; j < places.size(); ++j) {
            if (places[j] >= 0) {
              registers[places[j]] = list[j];
            }
          }
        }
      }
      for (const int place : op.frees) {
        registers[place].reset();
      }
    }
    return true;
  }

  bool is_expected(const Op& op, const torch::jit::Stack& stack) const {
    for (size_t i = 0; i < op.numbers.size(); ++i) {
      const auto& number = op.numbers[i]; // a list if it is so much for each kept row
      if (stack[i] != (number.isIntList() ? IValue(number.toIntVector().at(0) * count) : number)) {
        return false;
      }
    }
    for (size_t i = 0; i < op.sizes.size(); ++i) {
      const auto tensors = stack[i].isTensor() ? std::vector<Tensor>{stack[i].toTensor()} : stack[i].toTensorVector();
      if (tensors.size() != op.sizes[i].size()) {
        return false;
      }
      for (size_t j = 0; j < tensors.size(); ++j) {
        const auto& sizes = op.sizes[i][j];
        if (tensors[j].sizes().size() != sizes.fixed.size()) {
          return false;
        }
        for (size_t d = 0; d < sizes.fixed.size(); ++d) {
          if (tensors[j].size(static_cast<int64_t>(d)) != sizes.at(d, count)) {
            return false;
          }
        }
      }
    }
    return true;
  }

  const Tensor& read(int place) const {
    const auto& x = registers[place];
    TORCH_CHECK(
        versions[place] < 0 || versions[place] == static_cast<int64_t>(x._version()),
        "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor ",
        x.sizes(), " was changed while the backward pass ran");
    return x;
  }

  IValue integers(const Op::Counted& counted) const {
    if (!counted.is_list) {
      return counted.numbers.at(0, count);
    }
    c10::List<int64_t> out;
    for (size_t i = 0; i < counted.numbers.fixed.size(); ++i) {
      out.push_back(counted.numbers.at(i, count));
    }
    return out;
  }

  IValue tensors(const Op::List& list) const {
    if (list.is_optional) {
      c10::List<std::optional<Tensor>> out;
      for (const int place : list.registers) {
        out.push_back(place < 0 ? std::nullopt : std::make_optional(read(place)));
      }
      return out;
    }
    c10::List<Tensor> out;
    for (const int place : list.registers) {
      out.push_back(read(place));
    }
    return out;
  }

  Tensor take(size_t leaf) {
    const auto& result = program->results[leaf];
    if (result.place < 0) {
      return Tensor();
    }
    advance(result.end);
    return std::move(registers[result.place]); // the only reference: it becomes `grad` without a copy
  }
};

// The gradients that a node hands to leaves.
struct Delivery : torch::autograd::FunctionPostHook {
  std::shared_ptr<Run> run;
  int task = torch::autograd::get_current_graph_task_id(); // the backward pass; a later one of the graph has its own
  std::vector<std::pair<size_t, size_t>> outputs; // output of the node, number of the leaf

  variable_list operator()(const variable_list& computed, const variable_list& /*grads*/) override {
    variable_list out = computed;
    if (task != torch::autograd::get_current_graph_task_id()) {
      return out;
    }
    for (const auto& [output, leaf] : outputs) {
      Tensor grad = run->take(leaf);
      if (out.size() <= output) {
        out.resize(output + 1);
      }
      if (grad.defined()) {
        auto& place = out[output];
        place = place.defined() ? place + grad : std::move(grad);
      }
    }
    return out;
  }
};

inline void attach(const std::shared_ptr<Run>& run, const Graph& graph) {
  std::unordered_map<Node*, std::unique_ptr<Delivery>> hooks;
  for (size_t i = 0; i < graph.leaves.size(); ++i) {
    const auto& leaf = graph.leaves[i];
    auto& hook = hooks[leaf.producer];
    if (hook == nullptr) {
      hook = std::make_unique<Delivery>();
      hook->run = run;
    }
    hook->outputs.emplace_back(leaf.output, i);
  }
  for (auto& [node, hook] : hooks) {
    node->add_post_hook(std::move(hook));
  }
}

} // namespace hf_trim
