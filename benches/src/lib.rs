//! Support for the benchmark suites, the conformance tool and the demo of controlgen (not published).
