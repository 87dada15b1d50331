// Gather and write-back of whole slabs on the host (native.py calls this). A tensor is a number of rows; rows are
// dealt out in tasks that depend on shapes alone, so that sums do not depend on how many threads there are.

#include "native_rows.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>

namespace {

constexpr int AXES = 8;
constexpr int64_t TASK = 1 << 16;  // elements of a task, about
constexpr int64_t LINE = 64;       // bytes

}  // namespace

extern "C" {
struct Move {  // one tensor, both of one type and contiguous; as in native.py
  void* dense;
  void* full;
  int64_t bytes;   // of an element
  int64_t number;  // whether the type is float32, float64 or bfloat16
  int64_t axes;
  int64_t shape[AXES];         // of the full tensor
  int64_t kept[AXES];          // of the dense one
  const int64_t* index[AXES];  // sorted; null: all
};
}

namespace {

struct Tensor {
  const Move* move;
  int outer = 0;  // so many axes number the rows
  int64_t rows = 1;
  int64_t stride[AXES];  // elements of the full tensor
  Columns columns;

  int64_t start(int64_t row) const {  // of a row in the full tensor, elements
    int64_t offset = 0;
    for (int axis = outer - 1; axis >= 0; --axis) {
      const int64_t i = row % move->kept[axis];
      row /= move->kept[axis];
      offset += (move->index[axis] ? move->index[axis][i] : i) * stride[axis];
    }
    return offset;
  }
};

struct Task {
  const Tensor* tensor;
  int64_t row, rows;
  int64_t from, length;  // within the row: less than all of it where rows are long and whole
  double squared = 0;
};

bool valid(const int64_t* index, int64_t kept, int64_t size) {
  for (int64_t i = 0; i < kept; ++i) {
    if (index[i] < 0 || index[i] >= size || (i && index[i] <= index[i - 1])) return false;
  }
  return true;
}

void choose(Columns& columns, const int64_t* index, int64_t kept, int64_t size, int64_t block, int64_t bytes) {
  columns.length = kept * block;
  columns.full = size * block;
  for (int64_t j = 0; j < kept; ++j) {
    if (j && index[j] == index[j - 1] + 1) {
      columns.runs.back().length += block;
    } else {
      columns.runs.push_back({j * block, index[j] * block, block});
    }
  }
  const int64_t average = columns.length / std::max<int64_t>(1, columns.runs.size()) * bytes;
  if (MASKS && (bytes == 2 || bytes == 4) && average < 2 * LINE) {
    columns.masks.assign((columns.full + 31) / 32 * 2, 0);
    for (const Run& run : columns.runs) {
      for (int64_t i = run.full; i < run.full + run.length; ++i) columns.masks[i / 16] |= uint16_t(1 << i % 16);
    }
  } else if (block == 1 && average < LINE) {
    columns.singles = index;
  }
}

// Into rows; false where an index is not sorted, distinct and in range.
bool prepare(Tensor& tensor, const Move& move) {
  tensor.move = &move;
  int last = -1;  // the last axis that is not kept whole
  for (int axis = 0; axis < move.axes; ++axis) {
    if (!move.kept[axis]) return true;  // no rows: columns.length stays 0
    if (!move.index[axis]) continue;
    if (!valid(move.index[axis], move.kept[axis], move.shape[axis])) return false;
    last = axis;
  }
  int64_t block = 1;
  for (int axis = int(move.axes) - 1; axis > last; --axis) block *= move.shape[axis];
  // Columns of a cache line and more each are rows.
  const bool whole = last < 0 || block * move.bytes >= LINE;
  tensor.outer = whole ? last + 1 : last;
  int64_t stride = block;
  for (int axis = last; axis >= 0; --axis) {
    tensor.stride[axis] = stride;
    stride *= move.shape[axis];
    if (axis < tensor.outer) tensor.rows *= move.kept[axis];
  }
  if (whole) {
    tensor.columns.length = tensor.columns.full = block;
  } else {
    choose(tensor.columns, move.index[last], move.kept[last], move.shape[last], block, move.bytes);
  }
  return true;
}

void deal(std::vector<Task>& tasks, const Tensor& tensor) {
  const Columns& columns = tensor.columns;
  const int64_t length = columns.length;
  if (!length) return;
  if (columns.runs.empty() && length > TASK) {
    for (int64_t row = 0; row < tensor.rows; ++row) {
      for (int64_t from = 0; from < length; from += TASK) {
        tasks.push_back({&tensor, row, 1, from, std::min(TASK, length - from)});
      }
    }
  } else {
    const int64_t step = std::max<int64_t>(1, TASK / length);
    for (int64_t row = 0; row < tensor.rows; row += step) {
      tasks.push_back({&tensor, row, std::min(step, tensor.rows - row), 0, length});
    }
  }
}

// Calls row(dense offset, full offset, full offset to fetch for the next, columns) for every row of a task; whole rows
// that adjoin are one.
template <class Row>
void each_row(const Task& task, Row row) {
  const Tensor& tensor = *task.tensor;
  const bool whole = tensor.columns.runs.empty();
  const int64_t length = tensor.columns.length, full = tensor.columns.full, end = task.row + task.rows;
  Columns merged;
  if (whole) merged.runs.push_back({0, 0, 0});
  int64_t start = tensor.start(task.row);
  for (int64_t r = task.row, next, following; r < end; r = next, start = following) {
    following = start;
    for (next = r + 1; next < end; ++next) {
      following = tensor.start(next);
      if (!whole || following != start + (next - r) * length) break;
    }
    // Long rows that follow on each other the hardware fetches better.
    const bool dense = tensor.columns.singles || !tensor.columns.masks.empty();
    const bool foreseen = dense && full > 2048 && following == start + full;
    if (whole) merged.length = merged.full = merged.runs[0].length = (next - r - 1) * length + task.length;
    row(r * length + task.from, start + task.from, foreseen ? start : following, whole ? merged : tensor.columns);
  }
}

template <class Bits>
void gather_task(const Task& task) {
  const Move& move = *task.tensor->move;
  each_row(task, [&](int64_t dense, int64_t full, int64_t ahead, const Columns& columns) {
    const Bits* from = (const Bits*)move.full;
    gather_row((Bits*)move.dense + dense, from + full, columns, from + ahead);
  });
}

template <bool delta, class Bits>
void scatter_task(Task& task) {
  const Move& move = *task.tensor->move;
  each_row(task, [&](int64_t dense, int64_t full, int64_t ahead, const Columns& columns) {
    Bits* to = (Bits*)move.full;
    task.squared += scatter_row<delta>((const Bits*)move.dense + dense, to + full, columns, to + ahead);
  });
}

template <bool delta>
void scatter_task(Task& task) {
  switch (task.tensor->move->bytes) {
    case 1: return scatter_task<delta, uint8_t>(task);
    case 2: return scatter_task<delta, uint16_t>(task);
    case 4: return scatter_task<delta, uint32_t>(task);
    case 8: return scatter_task<delta, uint64_t>(task);
  }
}

void gather_task(const Task& task) {
  switch (task.tensor->move->bytes) {
    case 1: return gather_task<uint8_t>(task);
    case 2: return gather_task<uint16_t>(task);
    case 4: return gather_task<uint32_t>(task);
    case 8: return gather_task<uint64_t>(task);
  }
}

// Calls work() in so many threads, this one among them; a thread that cannot be had is done without.
template <class Work>
void in_threads(int64_t threads, Work work) {
  std::vector<std::thread> others;
  try {
    while (int64_t(others.size()) + 1 < threads) others.emplace_back(work);
  } catch (const std::system_error&) {
  }
  work();
  for (std::thread& other : others) other.join();
}

// Prepares all, calls work(task) for every task; returns the number of the first tensor whose index is wrong, or −1.
template <class Work>
int64_t for_tasks(const Move* moves, int64_t count, int64_t threads, std::vector<Task>& tasks, Work work) {
  std::vector<Tensor> tensors(count);
  for (int64_t i = 0; i < count; ++i) {
    if (!prepare(tensors[i], moves[i])) return i;
  }
  for (const Tensor& tensor : tensors) deal(tasks, tensor);
  std::atomic<size_t> next{0};
  in_threads(std::min<int64_t>(threads, tasks.size()), [&] {
    for (size_t i = next++; i < tasks.size(); i = next++) work(tasks[i]);
  });
  return -1;
}

}  // namespace

extern "C" {

// Both return −1, or the number of the first tensor whose index is not sorted, distinct and in range: nothing was done.
int64_t offload_gather(const Move* moves, int64_t count, int64_t threads) {
  std::vector<Task> tasks;
  return for_tasks(moves, count, threads, tasks, [](Task& task) { gather_task(task); });
}

// *squared = Σ (new − old)² over numbers, in an order that shapes alone decide.
int64_t offload_scatter(const Move* moves, int64_t count, int64_t threads, int64_t delta, double* squared) {
  std::vector<Task> tasks;
  const int64_t wrong = for_tasks(moves, count, threads, tasks, [=](Task& task) {
    if (delta && task.tensor->move->number) {
      scatter_task<true>(task);
    } else {
      scatter_task<false>(task);
    }
  });
  *squared = 0;
  for (const Task& task : tasks) *squared += task.squared;
  return wrong;
}
}
