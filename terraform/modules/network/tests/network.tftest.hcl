mock_provider "aws" {
  source = "../mocks"
}

variables {
  name          = "test"
  cidr          = "10.20.0.0/16"
  zones         = { a = "us-east-1a", b = "us-east-1b", c = "us-east-1c" }
  nat_gateways  = 1
  flow_log_days = 7
}

run "one_nat_gateway" {
  assert {
    condition     = length(aws_subnet.private) == 3 && length(aws_nat_gateway.this) == 1
    error_message = "three private subnets, one way out"
  }
  assert {
    condition     = length(distinct([for route in aws_route.nat : route.nat_gateway_id])) == 1
    error_message = "every zone has a way out"
  }
  assert {
    condition     = length(distinct(concat([for s in aws_subnet.private : s.cidr_block], [for s in aws_subnet.public : s.cidr_block]))) == 6
    error_message = "no two subnets have the same addresses"
  }
  assert {
    condition     = alltrue([for s in aws_subnet.public : s.map_public_ip_on_launch != true])
    error_message = "no machine gets a public address by itself"
  }
  assert {
    condition     = aws_flow_log.this.traffic_type == "ALL"
    error_message = "refused packets are logged too"
  }
  assert {
    condition     = length(aws_vpc_endpoint.s3.route_table_ids) > 0
    error_message = "the lake is reached without the NAT gateways"
  }
}

run "three_nat_gateways" {
  variables {
    nat_gateways = 3
  }
  assert {
    condition     = alltrue([for zone, route in aws_route.nat : route.nat_gateway_id == aws_nat_gateway.this[zone].id])
    error_message = "each zone has its own way out"
  }
}
