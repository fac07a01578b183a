//! RFC 4787: Network Address Translation Behavioral Requirements for Unicast UDP.

use super::*;

const CLIENT: &str = "10.66.77.2:5000";
const SERVER: &str = "198.51.100.9:53";

fn ask(world: &mut World, client: &str, server: &str) -> Endpoint {
    source(&world.send(udp(at(client), at(server), b"question")).unwrap())
}

#[test]
fn req_1_the_mapping_does_not_depend_on_the_destination() {
    let mut world = World::new();
    let first = ask(&mut world, CLIENT, SERVER);
    assert_eq!(first.address, EXTERNAL);
    assert_eq!(ask(&mut world, CLIENT, "198.51.100.9:54"), first);
    assert_eq!(ask(&mut world, CLIENT, "192.0.2.77:9999"), first);
    assert_eq!(world.mapping(at(CLIENT)).unwrap().sessions, 3);
}

#[test]
fn a_datagram_goes_there_and_its_answer_comes_back() {
    let mut world = World::new();
    let external = ask(&mut world, CLIENT, SERVER);
    let answer = world.receive(udp(at(SERVER), external, b"answer")).unwrap();
    assert_eq!(ends(&answer), (at(SERVER), at(CLIENT)));
    assert_eq!(&answer[28..], b"answer");
}
