//! Answers the workload's DNS questions from the view of the mesh; forwards the rest.
