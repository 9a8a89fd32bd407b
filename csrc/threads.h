// A small thread pool: fork-join over independent tasks.
#pragma once

#include <cstdint>

namespace foldbit {

// Call body(context, task) once for each task in [0, tasks), on at most `threads` threads, the caller's
// among them, and return when all are done. Tasks are handed out one by one in rising order.
//
// The first exception a task throws is thrown again here, after every thread has let go of the job; tasks
// not yet started are then left out. A call made while another thread uses the pool, or from inside a task,
// runs on the caller's thread alone: the threads are busy already. A forked child starts a pool of its own.
void parallel_for(int64_t tasks, int threads, void (*body)(void* context, int64_t task), void* context);

// The same for a callable: parallel_for(rows, threads, [&](int64_t row) { ... });
template <class Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
  void (*call)(void*, int64_t) = [](void* context, int64_t task) {
    (*static_cast<const Body*>(context))(task);
  };
  parallel_for(tasks, threads, call, const_cast<Body*>(&body));
}

}  // namespace foldbit
