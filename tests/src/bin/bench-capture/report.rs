//! What was measured, as text or JSON.

use std::io::{self, Write};

use anyhow::Result;
use serde::Serialize;

use crate::{Cli, beside::Beside, edges::EdgesRow, programs::Hook, rounds::Row};

#[derive(Serialize)]
pub(crate) struct Report {
    kernel: String,
    connections_a_round: u64,
    rounds: usize,
    /// Nanoseconds a run of a program that does nothing, by the kernel's accounting; part of every other figure of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    accounting_ns_per_run: Option<f64>,
    beside: Vec<Row>,
    edges: Vec<EdgesRow>,
}

impl Report {
    pub(crate) fn new(cli: &Cli, rows: Vec<Row>, edges: Vec<EdgesRow>) -> Self {
        let empty = rows.iter().find(|row| row.beside == Beside::Empty);
        let release = nix::sys::utsname::uname().map(|name| name.release().display().to_string());
        Self {
            kernel: release.unwrap_or_default(),
            connections_a_round: cli.connections,
            rounds: cli.rounds,
            accounting_ns_per_run: empty
                .and_then(|row| row.programs.get(&Hook::States))
                .map(|cost| cost.ns_per_run),
            beside: rows,
            edges,
        }
    }

    pub(crate) fn print(&self, json: bool) -> Result<()> {
        let mut out = io::stdout().lock();
        if json {
            serde_json::to_writer_pretty(&mut out, self)?;
            writeln!(out)?;
            return Ok(());
        }
        writeln!(
            out,
            "Linux {}, {} connections a round, medians of {} interleaved rounds\n",
            self.kernel, self.connections_a_round, self.rounds
        )?;
        self.speeds(&mut out)?;
        writeln!(out)?;
        self.programs(&mut out)?;
        self.memory(&mut out)
    }

    fn speeds(&self, out: &mut impl Write) -> Result<()> {
        writeln!(
            out,
            "{:<12} {:>13} {:>7} {:>13} {:>8}",
            "BESIDE", "CONNECTIONS/S", "RATIO", "CPU S/M CONN", "RSS MIB"
        )?;
        for row in &self.beside {
            let name = name(row.beside);
            if let Some(reason) = &row.missing {
                writeln!(out, "{name:<12} missing: {}", reason.replace('\n', " "))?;
                continue;
            }
            write!(
                out,
                "{name:<12} {:>13.0} {:>7.3}",
                row.connections_per_second, row.ratio_to_nothing
            )?;
            if let Some(cpu) = row.cpu_seconds_per_million_connections {
                write!(out, " {cpu:>13.2}")?;
            }
            if let Some(resident) = row.resident {
                write!(out, " {:>8.1}", resident.now_mib)?;
            }
            writeln!(out)?;
        }
        Ok(())
    }

    fn programs(&self, out: &mut impl Write) -> Result<()> {
        let floor = self.accounting_ns_per_run.unwrap_or(0.0);
        writeln!(
            out,
            "{:<12} {:<8} {:>9} {:>7} {:>8} {:>9} {:>9}",
            "BESIDE", "PROGRAMS", "RUNS/CONN", "NS/RUN", "NS/CONN", "NET/RUN", "NET/CONN"
        )?;
        for row in &self.beside {
            let mut sum = [0.0; 2];
            let line = |out: &mut dyn Write, hook: &str, [runs, ns]: [f64; 2]| {
                writeln!(
                    out,
                    "{:<12} {hook:<8} {runs:>9.1} {:>7.0} {ns:>8.0} {:>9.0} {:>9.0}",
                    name(row.beside),
                    ns / runs,
                    ns / runs - floor,
                    ns - runs * floor
                )
            };
            for (hook, cost) in &row.programs {
                let cost = [cost.runs_per_connection, cost.ns_per_connection];
                line(out, &format!("{hook:?}").to_lowercase(), cost)?;
                sum = [sum[0] + cost[0], sum[1] + cost[1]];
            }
            if row.programs.len() > 1 {
                line(out, "all", sum)?;
            }
        }
        if self.accounting_ns_per_run.is_some() {
            writeln!(
                out,
                "\nA program that does nothing takes {floor:.0} ns a run by the same accounting; NET is what is more."
            )?;
        }
        Ok(())
    }

    fn memory(&self, out: &mut impl Write) -> Result<()> {
        if self.edges.is_empty() {
            return Ok(());
        }
        writeln!(
            out,
            "\n{:>9} {:>14} {:>13} {:>12} {:>12} {:>12}",
            "EDGES", "CONNECTIONS/S", "CPU S/M CONN", "RSS AT FIRST", "RSS AT LAST", "RSS AT MOST"
        )?;
        for row in &self.edges {
            let [edges, speed, cpu, before, after, most] = row.columns();
            writeln!(
                out,
                "{edges:>9} {speed:>14} {cpu:>13} {before:>12} {after:>12} {most:>12}"
            )?;
            if !row.losses().is_empty() {
                writeln!(out, "          lost: {:?}", row.losses())?;
            }
        }
        Ok(())
    }
}

fn name(beside: Beside) -> String {
    format!("{beside:?}").to_lowercase()
}
