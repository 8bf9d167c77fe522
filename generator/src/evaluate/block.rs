//! Blocks of addresses.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};
use k8s_openapi::api::networking::v1::IPBlock;

use super::{
    error::{Flaw, Problem},
    field::At,
};

/// The addresses of a network without those of some networks in it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Block {
    network: IpNet,
    /// Sorted.
    except: Vec<IpNet>,
}

impl Block {
    /// Whether the address is in the block.
    pub(super) fn contains(&self, address: IpAddr) -> bool {
        self.network.contains(&address) && !self.except.iter().any(|hole| hole.contains(&address))
    }

    /// The network and those that are left out of it.
    pub(super) fn networks(&self) -> impl Iterator<Item = IpNet> + '_ {
        std::iter::once(self.network).chain(self.except.iter().copied())
    }

    /// The address, if the block has only this one.
    pub(super) fn single(&self) -> Option<IpAddr> {
        (self.network.prefix_len() == self.network.max_prefix_len()).then(|| self.network.addr())
    }

    pub(super) fn compile(block: &IPBlock, at: &At<'_>) -> Result<Self, Flaw> {
        let network = parse(&block.cidr, &at.field("cidr"))?;
        let except_at = at.field("except");
        let mut except = Vec::new();
        for (i, text) in block.except.iter().flatten().enumerate() {
            let at = except_at.index(i);
            let hole = parse(text, &at)?;
            if !network.contains(&hole) || network == hole {
                let problem = Problem::Except {
                    except: text.clone(),
                    cidr: block.cidr.clone(),
                };
                return Err(problem.at(&at));
            }
            except.push(hole);
        }
        except.sort_unstable();
        except.dedup();
        Ok(Self { network, except })
    }
}

/// Bits behind the prefix are ignored, as the API server does. IPv4 that is written as IPv6 is IPv4.
fn parse(text: &str, at: &At<'_>) -> Result<IpNet, Flaw> {
    let network = text
        .parse::<IpNet>()
        .map_err(|_malformed| Problem::Cidr(text.to_owned()).at(at))?
        .trunc();
    let IpNet::V6(v6) = network else {
        return Ok(network);
    };
    let mapped = v6.addr().to_ipv4_mapped().and_then(|address| {
        let prefix = v6.prefix_len().checked_sub(96)?;
        Ipv4Net::new(address, prefix).ok()
    });
    Ok(mapped.map_or(network, IpNet::V4))
}
