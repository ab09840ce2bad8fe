"""Published comparisons of query strategies, run again on real data: each module is one paper's."""
